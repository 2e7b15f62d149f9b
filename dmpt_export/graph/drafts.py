"""Draft heads: the tokens that they predict after each row's next one, by their likeliest entry of a shortlist.

drafting? If: for each leaf that rows take, If:
              h + D_i h -- rows of the shortlist of the anchor's matrix -- argmax -- token ids
          rows back in their order
          else: nothing
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.builder import Builder, Spec
from dmpt_export.graph.linear import project
from quant.forms.weights import Weight, Weights, form_of
from runtime.graph_io import DRAFTS
from training.model.config import DMPTConfig

Rows = Mapping[str, tuple[ir.Value, ir.Value | None]]  # leaf -> [1, n, E], and whether there are any; None: always


def draft_weights(config: DMPTConfig, weights: Weights, vocabulary: np.ndarray) -> dict[str, Weight]:
    """The rows of a shortlist of token ids, of each matrix that draft heads multiply."""
    return {
        f"draft_vocab.{j}.weight": form_of(weights[config.head_name(j)]).take(vocabulary)
        for j in sorted({config.matrix_of(leaf, heads[0]) for leaf, heads in config.head_allocation.items()})
    }


class Drafter:
    """The draft heads of one graph. `vocabulary`: int64 [n], the shortlist."""

    def __init__(self, config: DMPTConfig, weights: Weights, vocabulary: np.ndarray) -> None:
        self.config, self.vocabulary = config, vocabulary
        self.weights = {**weights, **draft_weights(config, weights, vocabulary)}

    def tokens(
        self, b: Builder, drafting: ir.Value, rows: Rows, order: Callable[[Builder], ir.Value], shape: ir.Value
    ) -> ir.Value:
        """int64 [B, N, draft heads], or [0, 0, draft heads] when not drafting. drafting: bool []. order: index of each
        row among those of all leaves, leaf after leaf. shape: of the result."""
        spec = Spec(DRAFTS, ir.DataType.INT64, ("batch", "drafted", self.config.next_tokens))

        def then(inner: Builder) -> list[ir.Value]:
            parts = [self.of_leaf(inner, leaf, h, some) for leaf, (h, some) in rows.items()]
            flat = parts[0]
            if len(parts) > 1:
                joined = inner.op("Concat", *parts, name=f"{DRAFTS}.by_leaf", axis=1)
                flat = inner.op("Gather", joined, order(inner), name=f"{DRAFTS}.flat", axis=1)
            return [inner.op("Reshape", flat, shape, name=f"{DRAFTS}.ordered")]

        (drafts,) = b.branch(drafting, then, lambda inner: [inner.nothing(spec)], [spec], name=DRAFTS)
        return drafts

    def of_leaf(self, b: Builder, leaf: str, h: ir.Value, some: ir.Value | None) -> ir.Value:
        """[1, n, E] -> int64 [1, n, draft heads]."""
        if some is None:
            return self.likeliest(b, leaf, h)
        spec = Spec(f"{DRAFTS}.{leaf}", ir.DataType.INT64, (1, f"drafted_{leaf}", self.config.next_tokens))
        (found,) = b.branch(
            some,
            lambda inner: [self.likeliest(inner, leaf, h)],
            lambda inner: [inner.nothing(spec)],
            [spec],
            name=f"{DRAFTS}.{leaf}",
        )
        return found

    def likeliest(self, b: Builder, leaf: str, h: ir.Value) -> ir.Value:
        name, inputs = f"{DRAFTS}.{leaf}", []
        for i in range(self.config.next_tokens):
            head = self.config.draft_name(leaf, i).removesuffix(".weight")
            x = b.op("Add", h, project(b, self.weights, head, h), name=f"{head}.input")
            inputs.append(b.op("Unsqueeze", x, b.ints(2), name=f"{head}.by_head"))
        vectors = b.op("Concat", *inputs, name=f"{name}.vectors", axis=2)
        matrix = self.config.matrix_of(leaf, self.config.head_allocation[leaf][0])
        logits = project(b, self.weights, f"draft_vocab.{matrix}", vectors)
        best = b.op("ArgMax", logits, name=f"{name}.best", axis=-1, keepdims=0)
        ids = b.weight("const.draft_vocab", self.vocabulary.astype(np.int64))
        return b.op("Gather", ids, best, name=f"{name}.tokens")
