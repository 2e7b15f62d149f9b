"""dmpt_manifest.json: everything a runtime needs to drive the graph, and the source of the graph."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.assemble import OPSET, input_specs, output_specs
from dmpt_export.graph.builder import Spec
from dmpt_export.onnx.kv_cache import INT8, KV_FLOAT
from dmpt_export.onnx.sizes import n_parameters, parts_table, touched_per_token
from quant.forms.form import Form
from quant.forms.weights import Weights, form_of, quantized
from runtime.manifest_file import FORMAT, FORMAT_VERSION, MANIFEST_NAME, TOKENIZER_NAME
from training.checkpoints.record import FIELD
from training.model.config import DMPTConfig
from training.model.fields import tokens
from training.text.tokenizer import load_tokenizer, prefix_ids

MODEL_FILE = "model.onnx"
EXTERNAL_THRESHOLD = 1024  # bytes; smaller tensors stay inside model.onnx
ACTIVATIONS = {"cpu": ir.DataType.FLOAT, "web": ir.DataType.FLOAT, "cuda": ir.DataType.FLOAT16}  # by target


def describe(
    config: DMPTConfig, weights: Weights, target: str, folder: Path, kv_cache: str = KV_FLOAT, opset: int = OPSET
) -> dict[str, Any]:
    """Everything a runtime needs to drive the graph, and its source."""
    dtype = ACTIVATIONS[target]
    cache = ir.DataType.INT8 if kv_cache == INT8 else dtype
    touched_parameters, touched_bytes = touched_per_token(config, weights)
    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    own = ("splits", "head_kind", "head_rank", "shared_anchor", "fast_k", "head_topk")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": MODEL_FILE,
        "target": target,
        "opset": opset,
        "activation_dtype": dtype.numpy().name,
        "cache_dtype": cache.numpy().name,
        "config": {
            **{name: getattr(config, name) for name in (*sizes, *own)},
            "head_dim": config.n_embd // config.n_head,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": next(iter(tokens(config.eos_token_id)), None),
        },
        "tree": [
            {
                "name": node.name,
                "start": node.start,
                "stop": node.stop,
                "parent": node.parent,
                "children": list(node.children) if node.children else None,
                "prefix": node.prefix,
            }
            for node in config.tree.values()
        ],
        "leaves": config.leaves,
        "head_allocation": config.head_allocation,
        **({"domains": config.domains} if config.domains else {}),
        "inputs": [described(spec) for spec in input_specs(config, dtype, cache)],
        "outputs": [described(spec) for spec in output_specs(config, dtype, cache)],
        "quantization": {
            "scheme": scheme_of(weights),
            "tensors": {name: _storage(form) for name, form in quantized(weights).items()},
        },
        "parameters": {
            "total": sum(n_parameters(w) for w in weights.values()),
            "touched_per_token": touched_parameters,
        },
        "bytes_touched_per_token": touched_bytes,
        "parts": parts_table(weights),
        "branches_own_scales": True,  # see Builder.own_weight
        "branches_inline": True,  # see dmpt_export.onnx.export.save_graph
        "empty_leaves_guarded": True,  # see dmpt_export.graph.heads.top_k
        "files": {},
        "source": {"name": folder.name, "fingerprint": fingerprint(config, weights)},
        "tools": tool_versions(),
        **({FIELD: record} if (record := getattr(config, FIELD, None)) else {}),
        "parity": None,
    }


def text_rules(config: DMPTConfig, folder: Path) -> dict[str, list[int]]:
    """Start and end of the folder's texts: ids before every prompt, and ids that end a text."""
    prefix = prefix_ids(load_tokenizer(folder)) if (folder / TOKENIZER_NAME).is_file() else []
    return {"prefix": prefix, "end_of_text": tokens(config.eos_token_id)}


def scheme_of(weights: Weights) -> str:
    """One word for the manifest: the scheme of the blocks' layers, "mixed" with their bits, or "float"."""
    stored = [*quantized(weights).values()]
    layers = [w for w in stored if w.transposed] or stored
    if len({w.scheme for w in layers}) > 1:
        bits = 8 * sum(w.nbytes for w in layers) / sum(w.shape[0] * w.shape[1] for w in layers)
        return f"mixed {bits:.1f} bits"
    return layers[0].scheme if layers else "float"


def described(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype.numpy().name, "shape": list(spec.shape)}


def _storage(form: Form) -> dict[str, Any]:
    return {"scheme": form.scheme, "bits": form.bits, "block": form.block, "bytes": form.nbytes}


def fingerprint(config: DMPTConfig, weights: Weights) -> str:
    """sha256 over the configuration and every stored array, in name order."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name in sorted(weights):
        parts = form_of(weights[name]).parts()
        for label in sorted(parts):
            digest.update(f"{name}.{label}".encode())
            digest.update(np.ascontiguousarray(parts[label]).data)
    return digest.hexdigest()


def tool_versions() -> dict[str, str]:
    versions = {}
    for package in ("dmpt-export", "onnx-ir", "onnxruntime", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """List every other file with its hash and size, then write the manifest itself."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST_NAME)
    manifest["files"] = {}
    for name in names:
        path = folder / name
        with path.open("rb") as file:
            manifest["files"][name] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "size": path.stat().st_size,
            }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
