"""dmpt_manifest.json: what an exported folder holds, parsed and checked. Standard library only.

The file is checked in two steps, each listing everything it finds: the form (SCHEMA), then whether the parts
fit each other (tree, leaves, heads, graph inputs and outputs, files).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.consistency import HEAD_LOG_WEIGHTS, contradictions
from runtime.errors import ModelError
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
REPORT_NAME = "quantization_report.json"  # where weights were quantized: what each tensor lost; not needed to run
FORMAT, FORMAT_VERSION = "dmpt-onnx", 2
MOST_BYTES = 64 << 20  # of the manifest itself: a real one is some hundred kB

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
# Fields that exports have had since they were introduced; checked where they are there.
LATER: dict[str, Any] = {
    "requires": {"onnxruntime": VERSION},
    "branches_own_scales": BOOL,
    "text": {"prefix": [ID], "end_of_text": [ID]},
}


@dataclass(frozen=True)
class Node:
    """One segment of blocks between splits; nodes form a binary tree, parents before children."""

    name: str
    start: int  # first block index
    stop: int  # one past the last
    parent: str | None
    children: tuple[str, str] | None  # None: a leaf
    prefix: str  # what its blocks are filed under

    @property
    def caches(self) -> list[str]:
        """Names of its attention caches: `<prefix>.h.<block>.key` and `.value`, in the order of the graph."""
        return [f"{self.prefix}.h.{i}.{part}" for i in range(self.start, self.stop) for part in ("key", "value")]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes a runtime needs; the meaning of each field is that of the checkpoint's config.json."""

    vocab_size: int
    n_positions: int  # the longest context, in tokens
    n_embd: int
    n_layer: int
    n_head: int  # attention heads
    head_dim: int
    fast_k: int | None
    head_topk: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    splits: tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]  # a string is a free dimension


@dataclass(frozen=True)
class FileSpec:
    name: str
    size: int  # bytes
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest; `raw` is the JSON as it stands, for fields that only people and tools read."""

    model: str  # file name of the graph
    target: str  # "cpu" or "cuda"
    activation_dtype: str  # of hidden rows: "float32" or "float16"
    cache_dtype: str  # of keys and values: the same, or "int8"
    config: ModelConfig
    tree: tuple[Node, ...]
    leaves: tuple[str, ...]
    head_allocation: dict[str, tuple[int, ...]]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    files: tuple[FileSpec, ...]
    raw: dict[str, Any] = field(repr=False)

    @property
    def nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.tree}

    @property
    def schemes(self) -> set[str]:
        """How the quantized tensors are stored; empty where all are float."""
        return {tensor["scheme"] for tensor in self.raw["quantization"]["tensors"].values()}

    @property
    def prefix(self) -> list[int]:
        """Ids that stand in front of every prompt, such as a beginning of text."""
        return list(self.raw["text"]["prefix"]) if "text" in self.raw else []

    @property
    def ends(self) -> list[int]:
        """Ids that end a text, the usual one first."""
        if "text" in self.raw:
            return list(self.raw["text"]["end_of_text"])
        return [] if self.config.eos_token_id is None else [self.config.eos_token_id]

    @property
    def least_onnxruntime(self) -> str | None:
        """The earliest version that has all operators of the graph; None where the export does not say."""
        return self.raw["requires"]["onnxruntime"] if "requires" in self.raw else None

    @property
    def has_outer_scales(self) -> bool:
        """Whether a branch multiplies by 4-bit weights whose scales belong to the main graph (earlier exports)."""
        if len(self.tree) == 1 or self.raw.get("branches_own_scales", False):
            return False
        whole = slice(1) if self.config.fast_k else slice(None)  # heads besides the anchor are gathered, not multiplied
        heads = {f"heads.{j}.weight" for heads in self.head_allocation.values() for j in heads[whole]}
        tensors = self.raw["quantization"]["tensors"]
        if not heads <= tensors.keys():  # a tied head 0
            heads.add("transformer.wte.weight")
        used = [tensor for name, tensor in tensors.items() if name.startswith("paths.") or name in heads]
        return any(tensor.get("bits") == 4 and tensor["scheme"] not in ("nf4", "fp4") for tensor in used)

    @property
    def tells_head_weights(self) -> bool:
        """Whether the graph yields what the heads of its leaves weigh; exports of before it did do not."""
        allocation = self.head_allocation.items()
        return all(len(heads) == 1 or f"{HEAD_LOG_WEIGHTS}.{leaf}" in self.outputs for leaf, heads in allocation)

    @property
    def outputs_of_any_size(self) -> list[str]:
        """Outputs that hold as many rows as were routed somewhere: to be bound anew before each run."""
        return [name for name in self.outputs if name.partition(".")[0] == HEAD_LOG_WEIGHTS]

    def way(self, leaf: str) -> tuple[str, ...]:
        """Names of the nodes from the root down to a leaf."""
        nodes, names = self.nodes, [leaf]
        while (parent := nodes[names[0]].parent) is not None:
            names.insert(0, parent)
        return tuple(names)


def read_manifest(folder: Path) -> Manifest:
    """Parse and check the manifest of an exported folder. Raises ModelError naming all that is missing or wrong."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise ModelError(f"the name {shown} is not UTF-8, which ONNX Runtime needs: rename the folder") from None
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: give the folder that `dmpt-export onnx` made")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ModelError(f"{folder} has no {MANIFEST_NAME}: make an ONNX folder with `dmpt-export onnx`")
    if path.stat().st_size > MOST_BYTES:
        raise ModelError(f"{path} is larger than {MOST_BYTES >> 20} MB, so it is no manifest: export the model again")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ModelError(f"{path} is no JSON ({error}): export the model again") from error
    return parse_manifest(raw, str(path))


def parse_manifest(raw: Any, where: str = MANIFEST_NAME) -> Manifest:
    """The manifest from its JSON value. Raises ModelError naming all that is missing or wrong; `where` begins it."""
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
    """The dataclasses of a JSON value that fits SCHEMA."""
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
