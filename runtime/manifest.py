"""The manifest as dataclasses: tree, sizes, graph inputs and outputs, files. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.graph_io import DRAFTS, HEAD_LOG_WEIGHTS, TensorSpec, cache_names

ROOT = "root"
PER_TENSOR = "int8-dynamic"  # the scheme whose kernels quantize the activations of all rows with one scale


@dataclass(frozen=True)
class Node:
    """One segment of blocks between splits; nodes form a binary tree, parents before children."""

    name: str
    start: int  # first block index
    stop: int  # one past the last
    parent: str | None
    children: tuple[str, str] | None  # None: a leaf
    prefix: str  # of its blocks' tensor names

    @property
    def caches(self) -> list[str]:
        """Names of its attention caches: `<prefix>.h.<block>.key` and `.value`, in the order of the graph."""
        return cache_names(self)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes that the runtime needs; fields mean the same as in the checkpoint's config.json."""

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
class FileSpec:
    name: str
    size: int  # bytes
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest; `raw` is the unchanged JSON, for fields that only people and tools read."""

    model: str  # file name of the graph
    target: str  # "cpu", "cuda" or "web"
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
    def rounds_rows_together(self) -> bool:
        """Whether some kernels quantize the activations of all rows of a run with one scale."""
        return PER_TENSOR in self.schemes

    @property
    def schemes(self) -> set[str]:
        """Storage schemes of the quantized tensors; empty where all are float."""
        return {tensor["scheme"] for tensor in self.raw["quantization"]["tensors"].values()}

    @property
    def prefix(self) -> list[int]:
        """Ids in front of every prompt, such as a beginning-of-text token."""
        return list(self.raw["text"]["prefix"]) if "text" in self.raw else []

    @property
    def ends(self) -> list[int]:
        """Ids that end a text, the usual one first."""
        if "text" in self.raw:
            return list(self.raw["text"]["end_of_text"])
        return [] if self.config.eos_token_id is None else [self.config.eos_token_id]

    @property
    def draft_tokens(self) -> int:
        """Tokens that draft heads predict after each row's next one; 0 without draft heads."""
        return int(self.raw["drafts"]["tokens"]) if "drafts" in self.raw else 0

    @property
    def least_onnxruntime(self) -> str | None:
        """The earliest version that has all operators of the graph; None where the export does not state it."""
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
    def searches_empty_leaves(self) -> bool:
        """Whether a batch may run TopK on no rows, in a leaf that no text takes (earlier exports)."""
        if len(self.tree) == 1 or self.raw.get("empty_leaves_guarded", False):
            return False
        counts = {len(heads) for heads in self.head_allocation.values()}
        shared = self.raw["config"].get("shared_anchor", False) and len(counts) == 1  # the heads follow the leaves
        return bool(self.config.head_topk or (self.config.fast_k and not shared))

    @property
    def tells_head_weights(self) -> bool:
        """Whether the graph outputs head weights (older exports do not)."""
        allocation = self.head_allocation.items()
        return all(len(heads) == 1 or f"{HEAD_LOG_WEIGHTS}.{leaf}" in self.outputs for leaf, heads in allocation)

    @property
    def outputs_of_any_size(self) -> list[str]:
        """Outputs whose number of rows depends on the routes: they must be bound again before each run."""
        return [name for name in self.outputs if name.partition(".")[0] in (HEAD_LOG_WEIGHTS, DRAFTS)]

    def way(self, leaf: str) -> tuple[str, ...]:
        """Names of the nodes from the root down to a leaf."""
        nodes, names = self.nodes, [leaf]
        while (parent := nodes[names[0]].parent) is not None:
            names.insert(0, parent)
        return tuple(names)
