"""Checkpoint in, checked ONNX folder out (design contract, section 6)."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.assemble import OPSET, build, input_specs, output_specs
from dmpt_export.graph.builder import Spec
from dmpt_export.graph.linear import Weights
from dmpt_export.measure import n_parameters, parts_table, touched_per_token
from quant.checkpoint import load_weights
from quant.tensor import QuantizedTensor
from training.checkpoint import atomic_folder, copy_tokenizer, resolve
from training.config import DMPTConfig
from training.errors import InputError

FORMAT_VERSION = 1
MODEL_FILE, DATA_FILE, MANIFEST_FILE = "model.onnx", "model.onnx.data", "dmpt_manifest.json"
EXTERNAL_THRESHOLD = 1024  # bytes; smaller tensors stay inside model.onnx
ACTIVATIONS = {"cpu": ir.DataType.FLOAT, "cuda": ir.DataType.FLOAT16}


def export_onnx(
    source: str | Path,
    out: str | Path,
    target: str = "cpu",
    fast_k: int | None = None,
    head_topk: int | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Write the ONNX folder of a checkpoint and return its manifest.

    Args:
        source: DMPT folder, quantized folder, GPT-2 folder or hub id.
        out: folder to create; an earlier export there is replaced, anything else is refused.
        target: "cpu" (fp32 activations) or "cuda" (fp16).
        fast_k, head_topk: override the checkpoint's; 0 turns them off, None keeps them.
        verify: run the result and compare it with torch before publishing.

    Raises InputError (3) for an unusable source or option, ValidationError (4) when the exported model differs
    from the checkpoint beyond `dmpt_export.tolerances`; nothing is left behind then.
    """
    folder = resolve(source)
    config, weights = load_weights(folder)
    apply_overrides(config, fast_k, head_topk)
    scheme = scheme_of(weights)
    if target not in ACTIVATIONS:
        raise InputError(f"unknown target '{target}': choose one of {', '.join(ACTIVATIONS)}")
    if target == "cuda" and any(isinstance(w, QuantizedTensor) and w.per_row for w in weights.values()):
        raise InputError("int8-dynamic has no CUDA kernel in ONNX Runtime: quantize with --scheme int8 or int4 instead")
    model = build(config, weights, ACTIVATIONS[target])
    with atomic_folder(Path(out), "onnx") as temporary:
        ir.save(model, temporary / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=EXTERNAL_THRESHOLD)
        copy_tokenizer(folder, temporary)
        manifest = describe(config, weights, target, scheme, folder)
        (temporary / "README.md").write_text(readme(manifest), encoding="utf-8")
        write_manifest(manifest, temporary)
        if verify:
            from dmpt_export.verify import verify_folder

            manifest["parity"] = verify_folder(temporary, folder, config, scheme)
            write_manifest(manifest, temporary)
    return manifest


def apply_overrides(config: DMPTConfig, fast_k: int | None, head_topk: int | None) -> None:
    """Set fast_k and head_topk from the command line and check them against the model."""
    if fast_k is not None:
        config.fast_k = fast_k or None
    if head_topk is not None:
        config.head_topk = head_topk or None
    config.check()


def scheme_of(weights: Weights) -> str:
    """One word for the manifest: the scheme of the blocks' layers, or "float"."""
    schemes = [w.scheme for w in weights.values() if isinstance(w, QuantizedTensor) and w.transposed]
    schemes = schemes or [w.scheme for w in weights.values() if isinstance(w, QuantizedTensor)]
    return max(set(schemes), key=schemes.count) if schemes else "float"


def describe(config: DMPTConfig, weights: Weights, target: str, scheme: str, folder: Path) -> dict[str, Any]:
    """Everything a runtime needs to drive the graph, and where it came from."""
    dtype = ACTIVATIONS[target]
    touched_parameters, touched_bytes = touched_per_token(config, weights)
    fields = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "fast_k", "head_topk", "splits")
    return {
        "format": "dmpt-onnx",
        "format_version": FORMAT_VERSION,
        "model": MODEL_FILE,
        "target": target,
        "opset": OPSET,
        "activation_dtype": dtype.numpy().name,
        "config": {
            **{name: getattr(config, name) for name in fields},
            "head_dim": config.n_embd // config.n_head,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
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
        "inputs": [_io(spec) for spec in input_specs(config, dtype)],
        "outputs": [_io(spec) for spec in output_specs(config, dtype)],
        "quantization": {"scheme": scheme, "tensors": {n: _storage(w) for n, w in weights.items() if _is_quantized(w)}},
        "parameters": {
            "total": sum(n_parameters(w) for w in weights.values()),
            "touched_per_token": touched_parameters,
        },
        "bytes_touched_per_token": touched_bytes,
        "parts": parts_table(weights),
        "files": {},
        "source": {"name": folder.name, "fingerprint": fingerprint(config, weights)},
        "tools": tool_versions(),
        "parity": None,
    }


def _io(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype.numpy().name, "shape": list(spec.shape)}


def _is_quantized(weight: np.ndarray | QuantizedTensor) -> bool:
    return isinstance(weight, QuantizedTensor)


def _storage(weight: Any) -> dict[str, Any]:
    return {"scheme": weight.scheme, "bits": weight.bits, "block": weight.block, "bytes": weight.nbytes}


def fingerprint(config: DMPTConfig, weights: Weights) -> str:
    """sha256 over the configuration and every stored array, in name order."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name in sorted(weights):
        weight = weights[name]
        parts = weight.parts() if isinstance(weight, QuantizedTensor) else {"": weight}
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
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MANIFEST_FILE)
    manifest["files"] = {}
    for name in names:
        path = folder / name
        with path.open("rb") as file:
            manifest["files"][name] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "size": path.stat().st_size,
            }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def readme(manifest: dict[str, Any]) -> str:
    config, leaves = manifest["config"], ", ".join(manifest["leaves"])
    return f"""# {manifest["source"]["name"]}: ONNX

Exported by dmpt-export for {manifest["target"]}, weights {manifest["quantization"]["scheme"]}: \
{manifest["parameters"]["total"]:,} parameters, {manifest["parameters"]["touched_per_token"]:,} touched per token,
context {config["n_positions"]} tokens, paths: {leaves}.

    pip install 'dmpt-export[cpu]'
    dmpt-export run . "Once upon a time"

`{MANIFEST_FILE}` describes the graph's inputs and outputs, the node tree and how closely the exported model
was found to follow its checkpoint.
"""
