"""dmpt_manifest.json: what an exported folder holds, parsed and checked. Standard library only.

The file is checked in two steps, each listing everything it finds: the form (SCHEMA), then whether the parts
fit each other (tree, leaves, heads, graph inputs and outputs, files).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import ModelError
from runtime.schema import (
    COUNT,
    ID,
    ID_OR_NULL,
    NAME,
    NAME_OR_NULL,
    OBJECT_OR_NULL,
    PAIR_OR_NULL,
    SHA256,
    SHAPE,
    Each,
    faults,
    unsafe_name,
)

MANIFEST_NAME = "dmpt_manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT, FORMAT_VERSION = "dmpt-onnx", 1
ROOT = "root"
MOST_BYTES = 64 << 20  # of the manifest itself: a real one is some hundred kB
MOST_BLOCKS = 10_000
TARGETS = ("cpu", "cuda")
FLOATS = ("float32", "float16")

TENSOR = {"name": NAME, "dtype": NAME, "shape": SHAPE}
SCHEMA: dict[str, Any] = {
    "format": NAME,
    "format_version": COUNT,
    "model": NAME,
    "target": NAME,
    "opset": COUNT,
    "activation_dtype": NAME,
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
    "quantization": OBJECT_OR_NULL,
    "parameters": {"total": COUNT, "touched_per_token": COUNT},
    "bytes_touched_per_token": COUNT,
    "files": Each({"sha256": SHA256, "size": ID}),
    "source": OBJECT_OR_NULL,
    "tools": OBJECT_OR_NULL,
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

    def way(self, leaf: str) -> tuple[str, ...]:
        """Names of the nodes from the root down to a leaf."""
        nodes, names = self.nodes, [leaf]
        while (parent := nodes[names[0]].parent) is not None:
            names.insert(0, parent)
        return tuple(names)


def read_manifest(folder: Path) -> Manifest:
    """Parse and check the manifest of an exported folder. Raises ModelError naming all that is missing or wrong."""
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
    problems = faults(raw, SCHEMA)
    if not problems:
        manifest = build(raw)
        problems = tree_faults(manifest)
        problems += [] if problems else graph_faults(manifest)  # which the tree has to tell
        problems += [*value_faults(manifest), *file_faults(manifest)]
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


def tree_faults(manifest: Manifest) -> list[str]:
    """Whether the nodes form one tree that covers all blocks, parents first."""
    nodes = manifest.nodes
    if manifest.config.n_layer > MOST_BLOCKS:
        return [f"config.n_layer: {manifest.config.n_layer} is above {MOST_BLOCKS}"]
    if len(nodes) != len(manifest.tree) or not manifest.tree or manifest.tree[0].parent is not None:
        return ["tree: must begin with the root and name every node once"]
    if manifest.tree[0].name != ROOT:
        return [f"tree: the first node must be '{ROOT}'"]
    problems = []
    seen: dict[str, Node] = {}
    for node in manifest.tree:
        parent = None if node.parent is None else seen.get(node.parent)
        start = 0 if parent is None else parent.stop
        if seen and (parent is None or parent.children is None or node.name not in parent.children):
            problems.append(f"tree: '{node.name}' has no parent before it that names it as a child")
        if node.start != start or node.stop <= node.start:
            problems.append(f"tree: '{node.name}' holds blocks {node.start} to {node.stop}, expected from {start} on")
        if node.children is None and node.stop != manifest.config.n_layer:
            problems.append(f"tree: leaf '{node.name}' ends at block {node.stop} of {manifest.config.n_layer}")
        problems += [f"tree: '{child}' is missing" for child in node.children or () if child not in nodes]
        seen[node.name] = node
    leaves = [node.name for node in manifest.tree if node.children is None]
    if sorted(manifest.leaves) != sorted(leaves):
        problems.append(f"leaves: {list(manifest.leaves)} are not the tree's {leaves}")
    return problems


def value_faults(manifest: Manifest) -> list[str]:
    config = manifest.config
    problems = []
    if manifest.target not in TARGETS:
        problems.append(f"target: '{manifest.target}' is not one of {', '.join(TARGETS)}")
    if manifest.activation_dtype not in FLOATS:
        problems.append(f"activation_dtype: '{manifest.activation_dtype}' is not one of {', '.join(FLOATS)}")
    for leaf in sorted({*manifest.leaves, *manifest.head_allocation}):
        if leaf not in manifest.leaves or not manifest.head_allocation.get(leaf):
            problems.append(f"head_allocation: '{leaf}' is no leaf or has no heads")
    for name in ("fast_k", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        if value is not None and value > config.vocab_size - (name != "fast_k"):
            problems.append(f"config.{name}: {value} does not fit a vocabulary of {config.vocab_size}")
    return problems


def graph_faults(manifest: Manifest) -> list[str]:
    """Whether the inputs and outputs are those that the tree calls for, with their types."""
    problems = []
    for field_name, specs, wanted in (
        ("inputs", manifest.inputs, expected_inputs(manifest)),
        ("outputs", manifest.outputs, expected_outputs(manifest)),
    ):
        missing, unknown = sorted(wanted.keys() - specs.keys()), sorted(specs.keys() - wanted.keys())
        problems += [f"{field_name}: missing {', '.join(missing)}"] if missing else []
        problems += [f"{field_name}: unknown {', '.join(unknown)}"] if unknown else []
        problems += [
            f"{field_name}: {name} is {specs[name].dtype}, expected {dtype}"
            for name, dtype in wanted.items()
            if name in specs and specs[name].dtype != dtype
        ]
    return problems


def expected_inputs(manifest: Manifest) -> dict[str, str]:
    """name -> dtype of every graph input."""
    rows = manifest.activation_dtype
    return {
        "input_ids": "int64",
        "position_ids": "int64",
        "seqlens_k": "int32",
        "total_length": "int32",
        "last": "int64",
        **{f"pending.{node.name}": rows for node in manifest.tree if node.parent is not None},
        **{f"past.{cache}": rows for node in manifest.tree for cache in node.caches},
    }


def expected_outputs(manifest: Manifest) -> dict[str, str]:
    """name -> dtype of every graph output."""
    rows = manifest.activation_dtype
    return {
        "log_probs": "float32",
        "routes": "int64",
        **{f"rows.{node.name}": rows for node in manifest.tree if node.children is not None},
        **{f"present.{cache}": rows for node in manifest.tree for cache in node.caches},
    }


def file_faults(manifest: Manifest) -> list[str]:
    problems = [f"files: {unsafe}" for entry in manifest.files if (unsafe := unsafe_name(entry.name))]
    if manifest.model not in {entry.name for entry in manifest.files}:
        problems.append(f"files: does not list the model '{manifest.model}'")
    return problems
