"""Read and check dmpt_manifest.json. Standard library only.

Two checks, each of which lists every fault: the form (SCHEMA), then whether the parts agree (runtime.consistency:
tree, leaves, heads, graph inputs and outputs, files).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.consistency import contradictions
from runtime.errors import ModelError
from runtime.graph_io import TensorSpec
from runtime.manifest import FileSpec, Manifest, ModelConfig, Node
from runtime.schema import (
    BOOL,
    COUNT,
    ID,
    ID_OR_NULL,
    NAME,
    NAME_OR_NULL,
    OBJECT_OR_NULL,
    PAIR_OR_NULL,
    SHA256,
    SHAPE,
    VERSION,
    Each,
    faults,
)

MANIFEST_NAME = "dmpt_manifest.json"
TOKENIZER_NAME = "tokenizer.json"
CARD_NAME = "README.md"  # the model card, for people
REPORT_NAME = "quantization_report.json"  # of quantized weights: the error of each tensor; not needed to run
# Files of an export that no graph names.
PROOF_NAME = "dmpt_proof.json"  # see runtime.proof
SIDE_FILES = frozenset({CARD_NAME, REPORT_NAME, PROOF_NAME, TOKENIZER_NAME, "tokenizer_config.json"})
FORMAT, FORMAT_VERSION = "dmpt-onnx", 2
STANDARD_FORMAT = "dmpt-onnx-standard"  # of folders for other programs, which this one does not run
MOST_BYTES = 64 << 20  # of the manifest itself: a real one has a few hundred kB
TENSOR = {"name": NAME, "dtype": NAME, "shape": SHAPE}
SCHEMA: dict[str, Any] = {
    "format": NAME,
    "format_version": COUNT,
    "model": NAME,
    "target": NAME,
    "opset": COUNT,
    "activation_dtype": NAME,
    "cache_dtype": NAME,
    "config": {
        "vocab_size": COUNT,
        "n_positions": COUNT,
        "n_embd": COUNT,
        "n_layer": COUNT,
        "n_head": COUNT,
        "head_dim": COUNT,
        "fast_k": ID_OR_NULL,
        "head_topk": ID_OR_NULL,
        "bos_token_id": ID_OR_NULL,
        "eos_token_id": ID_OR_NULL,
        "splits": [ID],
    },
    "tree": [
        {"name": NAME, "start": ID, "stop": COUNT, "parent": NAME_OR_NULL, "children": PAIR_OR_NULL, "prefix": NAME}
    ],
    "leaves": [NAME],
    "head_allocation": Each([ID]),
    "inputs": [TENSOR],
    "outputs": [TENSOR],
    "quantization": {"scheme": NAME, "tensors": Each({"scheme": NAME})},
    "parameters": {"total": COUNT, "touched_per_token": COUNT},
    "bytes_touched_per_token": COUNT,
    "files": Each({"sha256": SHA256, "size": ID}),
    "source": OBJECT_OR_NULL,
    "tools": OBJECT_OR_NULL,
}
# Fields introduced later; checked where present.
LATER: dict[str, Any] = {
    "requires": {"onnxruntime": VERSION},
    "branches_own_scales": BOOL,
    "branches_inline": BOOL,
    "empty_leaves_guarded": BOOL,
    "drafts": {"tokens": COUNT, "vocabulary": COUNT},
    "training": OBJECT_OR_NULL,
    "text": {"prefix": [ID], "end_of_text": [ID]},
}


def read_manifest(folder: Path) -> Manifest:
    """Parse and check the manifest of an exported folder. Raises ModelError naming everything missing or wrong."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise ModelError(f"the name {shown} is not UTF-8, which ONNX Runtime needs: rename the folder") from None
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: give the folder that `dmpt-export onnx` made")
    path = folder / MANIFEST_NAME
    if not path.is_file() and (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is a checkpoint: export it with `dmpt-export onnx {folder} DEVICE`, then run DEVICE"
        )
    if not path.is_file():
        raise ModelError(f"{folder} has no {MANIFEST_NAME}: make an ONNX folder with `dmpt-export onnx`")
    if path.stat().st_size > MOST_BYTES:
        raise ModelError(f"{path} is larger than {MOST_BYTES >> 20} MB: it is not a manifest, export the model again")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ModelError(f"{path} is not JSON ({error}): export the model again") from error
    return parse_manifest(raw, str(path))


def parse_manifest(raw: Any, where: str = MANIFEST_NAME) -> Manifest:
    """The manifest from its JSON value. Raises ModelError, prefixed by `where`, naming everything missing or wrong."""
    if isinstance(raw, dict) and raw.get("format") == STANDARD_FORMAT:
        raise ModelError(
            f"{where}: this export has the standard layout, for optimum, onnxruntime-genai and transformers.js: "
            "open it with one of them, or export the checkpoint without --layout standard to run it here"
        )
    if isinstance(raw, dict) and (raw.get("format") != FORMAT or raw.get("format_version") != FORMAT_VERSION):
        found = f"format {raw.get('format')!r}, format_version {raw.get('format_version')!r}"
        raise ModelError(f"{where} has {found}; this program reads {FORMAT!r}, {FORMAT_VERSION}")
    later = {name: form for name, form in LATER.items() if isinstance(raw, dict) and name in raw}
    problems = faults(raw, SCHEMA | later)
    if not problems:
        manifest = build(raw)
        problems = contradictions(manifest)
    if problems:
        raise ModelError(f"{where} is damaged, export the model again: {'; '.join(problems)}")
    return manifest


def build(raw: dict[str, Any]) -> Manifest:
    """Build the dataclasses from a JSON value that fits SCHEMA."""
    config = {name: raw["config"][name] for name in SCHEMA["config"]}
    return Manifest(
        model=raw["model"],
        target=raw["target"],
        activation_dtype=raw["activation_dtype"],
        cache_dtype=raw["cache_dtype"],
        config=ModelConfig(**{**config, "splits": tuple(config["splits"])}),
        tree=tuple(
            Node(
                name=node["name"],
                start=node["start"],
                stop=node["stop"],
                parent=node["parent"],
                children=None if node["children"] is None else (node["children"][0], node["children"][1]),
                prefix=node["prefix"],
            )
            for node in raw["tree"]
        ),
        leaves=tuple(raw["leaves"]),
        head_allocation={leaf: tuple(heads) for leaf, heads in raw["head_allocation"].items()},
        inputs={spec["name"]: tensor_spec(spec) for spec in raw["inputs"]},
        outputs={spec["name"]: tensor_spec(spec) for spec in raw["outputs"]},
        files=tuple(FileSpec(name, entry["size"], entry["sha256"]) for name, entry in raw["files"].items()),
        raw=raw,
    )


def tensor_spec(spec: dict[str, Any]) -> TensorSpec:
    return TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"]))
