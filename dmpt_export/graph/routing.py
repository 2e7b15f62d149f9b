"""Hard routing: a flat row of Ifs in topological order (docs/design.md, Routing and catch-up).

    trunk rows -- gate -- choice [B, N] --+-- any for `left`?  If: run left  over pending + new rows
                                          |                        else pass its caches through
                                          +-- any for `right`? If: run right ...

A node runs when any of the last N positions is routed to a leaf under it; it then catches up on every row it has not
processed (`pending`), so its keys and values cover the full context and the result is exact. An inner node's branch
also evaluates its gate; a node that did not run returns zero rows, and nothing under it runs. With `every_node` all
nodes run and catch up, as rows that are decoded together must; heads still get only the rows routed to them.

In the standard layout (dmpt_export.graph.standard) nothing is ever pending: every node runs in every step, without an
If.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.blocks import Past, Stream, Timeline, block_prefixes, norm_stream, segment
from dmpt_export.graph.builder import Builder, Spec
from dmpt_export.graph.heads import gate_mlp
from dmpt_export.graph.leaf import OwnMatrices, ending
from quant.forms.weights import Weights
from runtime.graph_io import cache_specs
from training.model.config import DMPTConfig
from training.model.shape import Node


class Tail:
    """The last N positions, whose outputs are requested."""

    def __init__(self, b: Builder, last: ir.Value) -> None:
        """last: int64 [], N."""
        self.count = b.op("Reshape", last, b.ints(1), name="last.count")  # (1)
        self.start = b.op("Neg", self.count, name="last.start")  # (1), counted from the end

    def rows(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """[B, R, E] -> [B, N, E]."""
        return b.op("Slice", x, self.start, b.ints(np.iinfo(np.int64).max), b.ints(1), name=f"{name}.last")

    def places(self, b: Builder, pairs: ir.Value, name: str) -> ir.Value:
        """Pairs int64 [n, 2], (row, which of its last N), as indices into rows [B, R, E]: int64 [1, n, 2]."""
        ends = b.weight("const.ends", np.array([[[0, -1]]]))  # positions count from the end of the rows
        offset = b.op("Mul", self.count, ends, name=f"{name}.tail")
        return b.op("Add", pairs, offset, name=f"{name}.tail.pairs")

    def by_batch(self, b: Builder, *sizes: int) -> ir.Value:
        """The shape that splits flat rows [B * N, ...] by batch."""
        sizes_ = [b.ints(*sizes)] if sizes else []
        return b.op("Concat", b.ints(-1), self.count, *sizes_, name="last.shape", axis=0)


@dataclass
class Router:
    """Shared values of the nodes of one graph, and their results so far."""

    config: DMPTConfig
    weights: Weights
    time: Timeline
    tail: Tail
    every_node: ir.Value | None  # bool []; None without splits, and where every node always runs
    pending: Mapping[str, ir.Value]  # node -> [B, P, E]; empty where every node always runs
    past: Mapping[str, Past]  # block prefix -> caches
    rows: dict[str, ir.Value] = field(default_factory=dict)  # split node -> its new output rows
    on: dict[str, ir.Value] = field(default_factory=dict)  # node -> bool [B, N]: routed through it
    present: dict[str, Past] = field(default_factory=dict)
    leaf_results: dict[str, list[ir.Value]] = field(default_factory=dict)  # leaf -> see dmpt_export.graph.leaf
    head_log_weights: dict[str, ir.Value] = field(default_factory=dict)  # leaf with heads -> [rows routed to it, H]

    routed: dict[str, tuple[ir.Value, ir.Value | None]] = field(
        default_factory=dict
    )  # leaf -> rows for draft heads, if any

    @property
    def ending(self) -> OwnMatrices:
        return ending(self.config, self.weights)

    def choose(self, b: Builder, node: Node, x: ir.Value) -> ir.Value:
        """The child that each of the last N rows takes: [B, R, E] -> int64 [B, N], 0 left, 1 right; a tie goes left."""
        name = f"gates.{node.name}"
        flat = b.op("Reshape", self.tail.rows(b, x, name), b.ints(-1, self.config.n_embd), name=f"{name}.rows")
        logits = gate_mlp(b, self.weights, name, flat, "Tanh")  # (B * N, 2)
        choice = b.op("ArgMax", logits, name=f"{name}.choice", axis=-1, keepdims=0)
        return b.op("Reshape", choice, self.tail.by_batch(b), name=f"{name}.choices")

    def fork(self, b: Builder, node: Node, choice: ir.Value) -> None:
        """Mark which of the last N positions go through each child."""
        assert node.children is not None
        left, right = node.children
        turned = b.op("Cast", choice, name=f"routes.{right}", to=int(ir.DataType.BOOL))
        on = {left: b.op("Not", turned, name=f"routes.{left}"), right: turned}
        for child, here in on.items():
            if node.name in self.on:
                here = b.op("And", here, self.on[node.name], name=f"routes.{child}.on_way")
            self.on[child] = here

    def run_if_needed(self, b: Builder, node: Node) -> None:
        """Append the node's If, or its blocks where it always runs, and record its outputs."""
        prefixes = block_prefixes(node)
        taken = b.op("ReduceMax", self.on[node.name], name=f"routes.{node.name}.taken", keepdims=0)
        specs = [
            *self._result_specs(b, node),
            *map(Spec.of, cache_specs(node, self.config, self.past[prefixes[0]].dtype.numpy().name, "present")),
        ]

        def then(inner: Builder) -> list[ir.Value]:
            new, present = self._run(inner, node)
            results = (self._leaf_results if node.children is None else self._fork_results)(inner, node, new)
            return [*results, *(t for p in prefixes for t in (present[p].key, present[p].value))]

        def otherwise(inner: Builder) -> list[ir.Value]:
            caches = [t for p in prefixes for t in (self.past[p].key, self.past[p].value)]
            kept = [inner.op("Identity", cache, name=f"{node.prefix}.kept") for cache in caches]
            return [*self._skipped(inner, node), *kept]

        if self.every_node is None:
            results = then(b)
        else:
            needed = b.op("Or", taken, self.every_node, name=f"routes.{node.name}.needed")
            results = b.branch(needed, then, otherwise, specs, name=node.prefix)
        results, caches = results[: -2 * len(prefixes)], results[-2 * len(prefixes) :]
        if node.children is None:
            self.leaf_results[node.name] = results
            if len(self.config.head_allocation[node.name]) > 1:
                self.head_log_weights[node.name] = results[1]
            if self.config.next_tokens:
                self.routed[node.name] = (results[-1], taken)
        else:
            self.rows[node.name], choice = results
            self.fork(b, node, choice)
        for i, prefix in enumerate(prefixes):
            self.present[prefix] = Past(caches[2 * i], caches[2 * i + 1])

    def _run(self, b: Builder, node: Node) -> tuple[Stream, dict[str, Past]]:
        """Catch up: the node's blocks over its pending rows and its parent's new ones."""
        assert node.parent is not None
        stream = Stream(self.rows[node.parent])
        if node.name in self.pending:
            inputs = (self.pending[node.name], stream.x)
            stream = Stream(b.op("Concat", *inputs, name=f"{node.prefix}.input", axis=1))
        wanted = self._routed(b, node) if node.children is None else None
        return segment(b, self.config, self.weights, node, stream, self.time, self.past, wanted)

    def _routed(self, b: Builder, leaf: Node) -> Callable[[ir.Value, str], ir.Value]:
        """Picks the rows routed to a leaf: [B, R, E] -> [1, n, E]."""
        where = b.op("NonZero", self.on[leaf.name], name=f"routes.{leaf.name}.where")  # (2, n): row and position
        pairs = b.op("Transpose", where, name=f"routes.{leaf.name}.pairs")
        places = self.tail.places(b, pairs, leaf.prefix)
        return lambda x, name: b.op("GatherND", x, places, name=f"{name}.routed")

    def _result_specs(self, b: Builder, node: Node) -> list[Spec]:
        if node.children is None:
            return self.ending.specs(b, node.name)
        return [
            Spec(f"rows.{node.name}", b.dtype, ("batch", f"rows_{node.name}", self.config.n_embd)),
            Spec(f"choice.{node.name}", ir.DataType.INT64, ("batch", "last")),
        ]

    def _leaf_results(self, b: Builder, node: Node, stream: Stream) -> list[ir.Value]:
        """Results of the rows routed here, which alone are left of the stream."""
        h, _ = norm_stream(b, self.weights, stream, f"{node.prefix}.ln_f", self.config.layer_norm_epsilon)
        return self.ending.results(b, node.name, h)

    def _fork_results(self, b: Builder, node: Node, stream: Stream) -> list[ir.Value]:
        rows = stream.total(b, f"{node.prefix}.output")
        return [rows, self.choose(b, node, rows)]

    def _skipped(self, b: Builder, node: Node) -> list[ir.Value]:
        """Outputs of a node that did not run: no rows, and for an inner node an unused choice."""
        if node.children is None:
            return [b.nothing(spec) for spec in self.ending.specs(b, node.name)]
        nothing = b.op(
            "Slice", self.rows[node.parent or ""], b.ints(0), b.ints(0), b.ints(1), name=f"{node.prefix}.no_rows"
        )
        here = self.on[node.name]
        return [nothing, b.op("Cast", here, name=f"{node.prefix}.no_choice", to=int(ir.DataType.INT64))]

    def in_order(self, b: Builder) -> tuple[ir.Value, ir.Value]:
        """(log_probs [B, N, V], routes int64 [B, N]) from the leaves' results, rows back in their order."""
        leaves, ending = self.config.leaves, self.ending
        specs = ending.specs(b, leaves[0])[: ending.ordered]
        axes = [spec.shape.index(f"routed_{leaves[0]}") for spec in specs]
        by_result = [[self.leaf_results[leaf][i] for leaf in leaves] for i in range(len(specs))]
        one = b.op(
            "Equal", b.op("Size", self.on[leaves[0]], name="last.size"), b.ints(1, scalar=True), name="last.is_one"
        )

        def joined(inner: Builder) -> list[ir.Value]:
            return [
                inner.op("Concat", *parts, name=f"leaves.{i}.joined", axis=axis)
                for i, (parts, axis) in enumerate(zip(by_result, axes, strict=True))
            ]

        def reordered(inner: Builder) -> list[ir.Value]:
            order = self.order(inner)
            return [
                inner.op("Gather", part, order, name=f"leaves.{i}.ordered", axis=axis)
                for i, (part, axis) in enumerate(zip(joined(inner), axes, strict=True))
            ]

        ordered = [
            Spec(f"leaves.{i}", spec.dtype, tuple("tail" if isinstance(n, str) else n for n in spec.shape))
            for i, spec in enumerate(specs)
        ]
        flat = ending.finish(b, b.branch(one, joined, reordered, ordered, name="leaves.order"))
        shape = self.tail.by_batch(b, self.config.vocab_size)
        return b.op("Reshape", flat, shape, name="log_probs.by_batch"), self._routes(b)

    def order(self, b: Builder) -> ir.Value:
        """For each flat position [B * N], the index of its row among the computed rows, leaf after leaf: [B * N]."""
        order = b.op(
            "Concat", *(positions_of(b, self.on[leaf], leaf) for leaf in self.config.leaves), name="order", axis=0
        )
        n = b.op("Size", order, name="order.n")
        numbers = b.op("Range", b.ints(0, scalar=True), n, b.ints(1, scalar=True), name="order.numbers")
        return b.op("ScatterElements", order, order, numbers, name="order.inverse", axis=0)

    def _routes(self, b: Builder) -> ir.Value:
        routes: ir.Value | None = None
        for i, leaf in enumerate(self.config.leaves[1:], start=1):
            here = b.op("Cast", self.on[leaf], name=f"routes.{leaf}.int", to=int(ir.DataType.INT64))
            term = here if i == 1 else b.op("Mul", here, b.ints(i, scalar=True), name=f"routes.{leaf}.index")
            routes = term if routes is None else b.op("Add", routes, term, name="routes.sum")
        assert routes is not None
        return routes


def positions_of(b: Builder, mask: ir.Value, name: str) -> ir.Value:
    """Flat positions where a bool [B, N] holds: int64 [n]."""
    flat = b.op("Reshape", mask, b.ints(-1), name=f"routes.{name}.flat")
    where = b.op("NonZero", flat, name=f"routes.{name}.where")  # (1, n)
    return b.op("Reshape", where, b.ints(-1), name=f"routes.{name}.positions")
