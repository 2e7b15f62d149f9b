"""Inputs and outputs of an exported graph: names, types and shapes. Standard library only.

The exporter builds graphs with them, and the runtime checks manifests against them (docs/design.md, Inputs and
outputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

DRAFTING, DRAFTS = "drafting", "drafts"  # whether draft heads run, and the tokens that they predict
HEAD_LOG_WEIGHTS = "head_log_weights"  # outputs of this name and the leaf's: log pi of the rows routed there


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]  # a string is a free dimension


class Segment(Protocol):
    """Blocks between two splits: runtime.manifest.Node, training.model.shape.Node."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def parent(self) -> str | None: ...

    @property
    def children(self) -> tuple[str, str] | None: ...

    @property
    def prefix(self) -> str: ...


class Sizes(Protocol):
    """A model's configuration."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_head(self) -> int: ...


def graph_inputs(
    nodes: Sequence[Segment], sizes: Sizes, rows: str, cache: str, next_tokens: int = 0
) -> list[TensorSpec]:
    """All inputs in order. nodes: parents first; rows, cache: types of hidden rows and of keys and values; next_tokens:
    draft heads of a leaf."""
    every_node = [TensorSpec("every_node", "bool", ())] if len(nodes) > 1 else []
    return [
        TensorSpec("input_ids", "int64", ("batch", "tokens")),
        TensorSpec("position_ids", "int64", ("batch", "tokens")),
        TensorSpec("seqlens_k", "int32", ("batch",)),
        TensorSpec("total_length", "int32", ()),
        TensorSpec("last", "int64", ()),
        *every_node,
        *([TensorSpec(DRAFTING, "bool", ())] if next_tokens else []),
        *(TensorSpec(f"pending.{n.name}", rows, ("batch", f"pending_{n.name}", sizes.n_embd)) for n in nodes[1:]),
        *(spec for node in nodes for spec in cache_specs(node, sizes, cache, "past")),
    ]


def graph_outputs(
    nodes: Sequence[Segment],
    sizes: Sizes,
    rows: str,
    cache: str,
    leaves: Sequence[str],
    allocation: Mapping[str, Sequence[int]],
    next_tokens: int = 0,
) -> list[TensorSpec]:
    """All outputs in order. Exports made before head_log_weights existed lack these."""
    return [
        TensorSpec("log_probs", "float32", ("batch", "last", sizes.vocab_size)),
        TensorSpec("routes", "int64", ("batch", "last")),
        *(
            TensorSpec(
                f"rows.{n.name}", rows, ("batch", "tokens" if n.parent is None else f"rows_{n.name}", sizes.n_embd)
            )
            for n in nodes
            if n.children
        ),
        *(spec for node in nodes for spec in cache_specs(node, sizes, cache, "present")),
        *(spec for leaf in leaves for spec in head_specs(leaf, allocation)),
        *([TensorSpec(DRAFTS, "int64", ("batch", "drafted", next_tokens))] if next_tokens else []),
    ]


def cache_names(node: Segment) -> list[str]:
    """The node's attention caches in the graph's order: `<prefix>.h.<block>.key` and `.value`."""
    return [f"{node.prefix}.h.{i}.{part}" for i in range(node.start, node.stop) for part in ("key", "value")]


def cache_specs(node: Segment, sizes: Sizes, dtype: str, label: str) -> list[TensorSpec]:
    """Inputs (`past`) or outputs (`present`) of the node's caches."""
    shape = ("batch", sizes.n_head, "capacity", sizes.n_embd // sizes.n_head)
    return [TensorSpec(f"{label}.{name}", dtype, shape) for name in cache_names(node)]


def head_specs(leaf: str, allocation: Mapping[str, Sequence[int]]) -> list[TensorSpec]:
    """log pi of a leaf's heads for the rows routed to it, in their order; nothing for a single head."""
    heads = len(allocation.get(leaf, ()))
    return [TensorSpec(f"{HEAD_LOG_WEIGHTS}.{leaf}", "float32", (f"routed_{leaf}", heads))] if heads > 1 else []
