"""What a leaf's If yields for the rows routed to it, and how the graph goes on from there.

Heads with matrices of their own run inside the leaf's If and yield log-probs. Where all leaves use one matrix
(`shared_anchor`), the Ifs yield what it multiplies, and the matrix follows once, in the main graph:

    left  -- h + P h of the anchor, P h of the others --+
                                                        +-- rows in order -- the matrix -- TopK -- candidates -- mixture
    right -- h + P h of the anchor, P h of the others --+

So its scales are stored once, and rows of different leaves share a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dmpt_export.graph.builder import Builder, Spec
from dmpt_export.graph.heads import fast_mixture, head_log_weights, leaf_log_probs, log_softmax, mix, to_float
from dmpt_export.graph.linear import project
from dmpt_export.graph.projected import from_anchor, head_input, on_candidates, projections
from quant.forms.weights import Weights
from runtime.graph_io import head_specs
from training.model.config import DMPTConfig

MIXTURE = "mixture"  # prefix of the shared nodes' names


@dataclass(frozen=True)
class OwnMatrices:
    """Every leaf runs its heads. The first result is that of the rows, [1, n, ...]; then log pi [n, H], if any; last,
    for draft heads, the rows themselves, [1, n, E]."""

    config: DMPTConfig
    weights: Weights

    ordered = 1  # results that finish() needs, with their rows in order

    def specs(self, b: Builder, leaf: str) -> list[Spec]:
        rows = Spec(f"log_probs.{leaf}", ir.DataType.FLOAT, (1, f"routed_{leaf}", self.config.vocab_size))
        return [rows, *map(Spec.of, head_specs(leaf, self.config.head_allocation)), *self.drafting_specs(b, leaf)]

    def drafting_specs(self, b: Builder, leaf: str) -> list[Spec]:
        own = Spec(f"hidden.{leaf}", b.dtype, (1, f"routed_{leaf}", self.config.n_embd))
        return [own] if self.config.next_tokens else []

    def results(self, b: Builder, leaf: str, h: ir.Value) -> list[ir.Value]:
        """Rows routed to a leaf, after its norm [1, n, E] -> results as in specs()."""
        log_probs, log_pi = leaf_log_probs(b, self.config, self.weights, leaf, h)
        return [log_probs, *([log_pi] if log_pi is not None else []), *self.for_drafts(b, h)]

    def for_drafts(self, b: Builder, h: ir.Value) -> list[ir.Value]:
        return [b.op("Identity", h, name="hidden.rows")] if self.config.next_tokens else []

    def finish(self, b: Builder, results: list[ir.Value]) -> ir.Value:
        """Results of all rows, in order -> log-probs [1, n, V]."""
        return results[0]


@dataclass(frozen=True)
class OneMatrix(OwnMatrices):
    """Every leaf only prepares what the shared matrix multiplies: [1, n, H, E], the anchor first."""

    @property
    def heads(self) -> int:
        """Heads of every leaf."""
        return len(self.config.head_allocation[self.config.leaves[0]])

    @property
    def ordered(self) -> int:  # type: ignore[override]
        return 1 if self.heads == 1 else 2

    def specs(self, b: Builder, leaf: str) -> list[Spec]:
        _, *others = super().specs(b, leaf)
        return [Spec(f"vectors.{leaf}", b.dtype, (1, f"routed_{leaf}", self.heads, self.config.n_embd)), *others]

    def results(self, b: Builder, leaf: str, h: ir.Value) -> list[ir.Value]:
        moves = projections(b, self.config, self.weights, leaf, h)
        anchor, *others = self.config.head_allocation[leaf]
        first = b.op("Unsqueeze", head_input(b, moves, anchor, h), b.ints(2), name=f"{leaf}.anchor")
        if not others:
            return [first, *self.for_drafts(b, h)]
        vectors = b.op("Concat", first, from_anchor(b, moves, anchor, others), name=f"{leaf}.vectors", axis=2)
        rows = b.op("Reshape", h, b.ints(-1, self.config.n_embd), name=f"{leaf}.rows")
        return [vectors, head_log_weights(b, self.config, self.weights, leaf, rows), *self.for_drafts(b, h)]

    def finish(self, b: Builder, results: list[ir.Value]) -> ir.Value:
        config, (vectors, *log_pi) = self.config, results
        matrix = config.head_name(0).removesuffix(".weight")
        if not log_pi:
            anchor = b.op("Squeeze", vectors, b.ints(2), name=f"{MIXTURE}.anchor.input")
            return log_softmax(b, project(b, self.weights, matrix, anchor), f"{MIXTURE}.anchor")
        if config.fast_k is None:
            added = to_float(b, project(b, self.weights, matrix, vectors), MIXTURE)  # (1, n, H, V)
            first, others = self._split(b, added)
            logits = b.op(
                "Concat", first, b.op("Add", others, first, name=f"{MIXTURE}.deltas"), name=f"{MIXTURE}.logits", axis=2
            )
            return mix(b, logits, log_pi[0], MIXTURE)
        first, others = self._split(b, vectors)
        anchor = b.op("Squeeze", first, b.ints(2), name=f"{MIXTURE}.anchor.input")
        log_anchor = log_softmax(b, project(b, self.weights, matrix, anchor), f"{MIXTURE}.anchor")

        def score(candidates: ir.Value) -> list[tuple[ir.Value, bool]]:
            return [(on_candidates(b, config, self.weights, others, candidates, MIXTURE), True)]

        return fast_mixture(b, config.fast_k, MIXTURE, log_anchor, log_pi[0], score)

    def _split(self, b: Builder, by_head: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The anchor's part and that of the other heads: [1, n, H, m] -> [1, n, 1, m], [1, n, H - 1, m]."""
        sizes = b.ints(1, self.heads - 1)
        first, others = b.ops("Split", by_head, sizes, name=f"{MIXTURE}.parts", outputs=2, axis=2)
        return first, others


def ending(config: DMPTConfig, weights: Weights) -> OwnMatrices:
    """How the leaves of a forked model end. Leaves that differ in their number of heads run the shared matrix alone."""
    same = len({len(heads) for heads in config.head_allocation.values()}) == 1
    return OneMatrix(config, weights) if config.shared_anchor and same else OwnMatrices(config, weights)
