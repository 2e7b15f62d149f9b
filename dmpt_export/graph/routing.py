"""Hard routing: a flat row of Ifs in topological order (design contract, section 5).

    trunk rows -- gate -- choice [B, N] --+-- any for `left`?  If: run left  over pending + new rows
                                          |                        else pass its caches through
                                          +-- any for `right`? If: run right ...

A node runs when some of the last N positions is routed to a leaf under it; it then catches up on every row it
has not seen (`pending`), so its keys and values cover the full context and the result is exact. An inner node's
branch also evaluates its gate; a node that did not run hands zero rows down, and nothing under it runs. With
`every_node` all nodes run and catch up, as rows that are decoded together must; heads still see only what is routed
to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.blocks import Past, Stream, Timeline, block_prefixes, layer_norm, segment
from dmpt_export.graph.builder import Builder, Spec
from dmpt_export.graph.heads import gate_mlp, leaf_log_probs
from dmpt_export.graph.linear import Weights
from training.config import DMPTConfig, Node


@dataclass
class Router:
    """What the nodes of one graph share, and what they have produced so far."""

    config: DMPTConfig
    weights: Weights
    time: Timeline
    last: ir.Value  # int64 [], N
    every_node: ir.Value | None  # bool []; None without splits
    pending: Mapping[str, ir.Value]  # node -> [B, P, E]
    past: Mapping[str, Past]  # block prefix -> caches
    rows: dict[str, ir.Value] = field(default_factory=dict)  # split node -> its new output rows
    on: dict[str, ir.Value] = field(default_factory=dict)  # node -> bool [B, N]: routed through it
    present: dict[str, Past] = field(default_factory=dict)
    log_probs: dict[str, ir.Value] = field(default_factory=dict)  # leaf -> [rows routed to it, V]

    def last_rows(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """The rows of the last N positions: [B, R, E] -> [B, N, E]."""
        start = b.op("Reshape", b.op("Neg", self.last, name=f"{name}.start"), b.ints(1), name=f"{name}.start")
        return b.op("Slice", x, start, b.ints(np.iinfo(np.int64).max), b.ints(1), name=f"{name}.last")

    def choose(self, b: Builder, node: Node, x: ir.Value) -> ir.Value:
        """The child each of the last N rows takes: [B, R, E] -> int64 [B, N], 0 left, 1 right; a tie goes left."""
        name = f"gates.{node.name}"
        flat = b.op("Reshape", self.last_rows(b, x, name), self.row_shape(b), name=f"{name}.rows")
        logits = gate_mlp(b, self.weights, name, flat, "Tanh")  # (B * N, 2)
        choice = b.op("ArgMax", logits, name=f"{name}.choice", axis=-1, keepdims=0)
        by_batch = b.op("Concat", b.ints(-1), self.n_last(b), name=f"{name}.shape", axis=0)
        return b.op("Reshape", choice, by_batch, name=f"{name}.choices")

    def row_shape(self, b: Builder) -> ir.Value:
        return b.ints(-1, self.config.n_embd)

    def n_last(self, b: Builder) -> ir.Value:
        return b.op("Reshape", self.last, b.ints(1), name="last.vector")

    def fork(self, b: Builder, node: Node, choice: ir.Value) -> None:
        """Mark which of the last N positions go through each child."""
        assert node.children is not None
        for turn, child in enumerate(node.children):
            here = b.op("Equal", choice, b.ints(turn, scalar=True), name=f"routes.{child}")
            if node.name in self.on:
                here = b.op("And", here, self.on[node.name], name=f"routes.{child}.on_way")
            self.on[child] = here

    def run_if_needed(self, b: Builder, node: Node) -> None:
        """Append the node's If and record what it yields."""
        prefixes = block_prefixes(node)
        count = b.op("Cast", self.on[node.name], name=f"routes.{node.name}.count", to=int(ir.DataType.INT32))
        most = b.op("ReduceMax", count, name=f"routes.{node.name}.any", keepdims=0)
        taken = b.op("Cast", most, name=f"routes.{node.name}.taken", to=int(ir.DataType.BOOL))
        needed = b.op("Or", taken, self.every_node, name=f"routes.{node.name}.needed")
        specs = [
            *self._result_specs(b, node),
            *cache_specs(self.config, self.past[prefixes[0]].dtype, prefixes, "present"),
        ]

        def then(inner: Builder) -> list[ir.Value]:
            new, present = self._run(inner, node)
            results = (
                self._leaf_results(inner, node, new) if node.children is None else self._fork_results(inner, node, new)
            )
            return [*results, *(t for p in prefixes for t in (present[p].key, present[p].value))]

        def otherwise(inner: Builder) -> list[ir.Value]:
            caches = [t for p in prefixes for t in (self.past[p].key, self.past[p].value)]
            kept = [inner.op("Identity", cache, name=f"{node.prefix}.kept") for cache in caches]
            return [*self._skipped(inner, node), *kept]

        first, *rest = b.branch(needed, then, otherwise, specs, name=node.prefix)
        if node.children is None:
            self.log_probs[node.name] = first
        else:
            self.rows[node.name] = first
            choice, *rest = rest
            self.fork(b, node, choice)
        for i, prefix in enumerate(prefixes):
            self.present[prefix] = Past(rest[2 * i], rest[2 * i + 1])

    def _run(self, b: Builder, node: Node) -> tuple[ir.Value, dict[str, Past]]:
        """Catch up: the node's blocks over its pending rows and its parent's new ones."""
        assert node.parent is not None
        inputs = (self.pending[node.name], self.rows[node.parent])
        rows = b.op("Concat", *inputs, name=f"{node.prefix}.input", axis=1)
        return segment(b, self.config, self.weights, node, Stream(rows), self.time, self.past)

    def _result_specs(self, b: Builder, node: Node) -> list[Spec]:
        if node.children is None:
            return [Spec(f"log_probs.{node.name}", ir.DataType.FLOAT, (f"routed_{node.name}", self.config.vocab_size))]
        return [
            Spec(f"rows.{node.name}", b.dtype, ("batch", f"rows_{node.name}", self.config.n_embd)),
            Spec(f"choice.{node.name}", ir.DataType.INT64, ("batch", "last")),
        ]

    def _leaf_results(self, b: Builder, node: Node, rows: ir.Value) -> list[ir.Value]:
        """Only the rows routed here meet the final norm and the heads: [(routed, V)]."""
        flat = b.op(
            "Reshape", self.last_rows(b, rows, f"{node.prefix}.tail"), self.row_shape(b), name=f"{node.prefix}.tail"
        )
        routed = b.op(
            "Gather", flat, positions_of(b, self.on[node.name], node.name), name=f"{node.prefix}.routed", axis=0
        )
        h = layer_norm(b, self.weights, routed, f"{node.prefix}.ln_f", self.config.layer_norm_epsilon)
        return [leaf_log_probs(b, self.config, self.weights, node.name, h)]

    def _fork_results(self, b: Builder, node: Node, rows: ir.Value) -> list[ir.Value]:
        return [rows, self.choose(b, node, rows)]

    def _skipped(self, b: Builder, node: Node) -> list[ir.Value]:
        """What a node that did not run yields: no rows, and for an inner node a choice nobody reads."""
        if node.children is None:
            return [empty(b, (0, self.config.vocab_size), ir.DataType.FLOAT, node.name)]
        nothing = b.op(
            "Slice", self.rows[node.parent or ""], b.ints(0), b.ints(0), b.ints(1), name=f"{node.prefix}.no_rows"
        )
        here = self.on[node.name]
        return [nothing, b.op("Cast", here, name=f"{node.prefix}.no_choice", to=int(ir.DataType.INT64))]

    def in_order(self, b: Builder) -> tuple[ir.Value, ir.Value]:
        """(log_probs [B, N, V], routes int64 [B, N]) from what the leaves yielded, rows back in their order."""
        leaves = self.config.leaves
        positions = [positions_of(b, self.on[leaf], leaf) for leaf in leaves]
        order = b.op("Concat", *positions, name="order", axis=0)  # (B * N), flat position of each computed row
        count = b.op("Shape", order, name="order.count")
        numbers = b.op(
            "Range",
            b.ints(0, scalar=True),
            b.op("Squeeze", count, name="order.n"),
            b.ints(1, scalar=True),
            name="order.numbers",
        )
        inverse = b.op("ScatterElements", order, order, numbers, name="order.inverse", axis=0)
        rows = b.op("Concat", *(self.log_probs[leaf] for leaf in leaves), name="log_probs.by_leaf", axis=0)
        flat = b.op("Gather", rows, inverse, name="log_probs.flat", axis=0)
        shape = b.op(
            "Concat", b.ints(-1), self.n_last(b), b.ints(self.config.vocab_size), name="log_probs.shape", axis=0
        )
        routes: ir.Value | None = None
        for i, leaf in enumerate(leaves[1:], start=1):
            here = b.op("Cast", self.on[leaf], name=f"routes.{leaf}.int", to=int(ir.DataType.INT64))
            term = b.op("Mul", here, b.ints(i, scalar=True), name=f"routes.{leaf}.index")
            routes = term if routes is None else b.op("Add", routes, term, name="routes.sum")
        assert routes is not None
        return b.op("Reshape", flat, shape, name="log_probs.ordered"), routes


def positions_of(b: Builder, mask: ir.Value, name: str) -> ir.Value:
    """Flat positions where a bool [B, N] holds: int64 [n]."""
    flat = b.op("Reshape", mask, b.ints(-1), name=f"routes.{name}.flat")
    where = b.op("NonZero", flat, name=f"routes.{name}.where")  # (1, n)
    return b.op("Reshape", where, b.ints(-1), name=f"routes.{name}.positions")


def empty(b: Builder, shape: tuple[int, ...], dtype: ir.DataType, name: str) -> ir.Value:
    zero = ir.tensor(np.zeros(1, dtype.numpy()))
    return b.op("ConstantOfShape", b.ints(*shape), name=f"{name}.skipped", value=zero)


def cache_specs(config: DMPTConfig, dtype: ir.DataType, prefixes: list[str], label: str) -> list[Spec]:
    """Graph inputs (`past`) or outputs (`present`) of the blocks' caches, key then value."""
    shape = ("batch", config.n_head, "capacity", config.n_embd // config.n_head)
    return [Spec(f"{label}.{prefix}.{part}", dtype, shape) for prefix in prefixes for part in ("key", "value")]
