"""Heads without a vocabulary matrix: h + P h goes into their leaf's, of which fast-k gathers the candidates' rows once.

    h --+-- P of each head --+-- minus the anchor's P h, if it has one -- [1, n, heads, E] --+
        +-- P of the anchor -+                                                               +-- [1, n, heads, K]
    candidates -- gather rows of the anchor's matrix -- [1, n, K, E] ------------------------+

The product is what the heads add to the anchor's logits, which are known: rounding only touches the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from dmpt_export.graph.builder import MSFT, Builder
from dmpt_export.graph.linear import project
from quant.forms.weights import Weights, form_of
from training.model.config import DMPTConfig


def projections(b: Builder, config: DMPTConfig, weights: Weights, leaf: str, h: ir.Value) -> dict[int, ir.Value]:
    """P h of each projected head of a leaf, by head: [..., E] -> [..., E]."""
    out = {}
    for j in config.head_allocation[leaf]:
        if j in config.projected_heads:
            x = h
            for name in config.projection_names(j):
                x = project(b, weights, name.removesuffix(".weight"), x)
            out[j] = x
    return out


def head_input(b: Builder, moves: Mapping[int, ir.Value], j: int, h: ir.Value) -> ir.Value:
    """What head j's vocabulary matrix multiplies: h + P h, or h."""
    return b.op("Add", h, moves[j], name=f"heads.{j}.input") if j in moves else h


def from_anchor(b: Builder, moves: Mapping[int, ir.Value], anchor: int, heads: Sequence[int]) -> ir.Value:
    """What heads on the anchor's matrix add to its input: P h, less the anchor's P h if it has one; moves [1, n, E] ->
    [1, n, heads, E]. A head without a P is the one that owns the matrix, and the anchor then projects."""
    parts = []
    for j in heads:
        if j not in moves:
            move = b.op("Neg", moves[anchor], name=f"heads.{j}.from_anchor")
        elif anchor in moves:
            move = b.op("Sub", moves[j], moves[anchor], name=f"heads.{j}.from_anchor")
        else:
            move = moves[j]
        parts.append(b.op("Unsqueeze", move, b.ints(2), name=f"heads.{j}.by_head"))
    return b.op("Concat", *parts, name=f"heads.{'_'.join(map(str, heads))}.vectors", axis=2)


def on_candidates(
    b: Builder,
    config: DMPTConfig,
    weights: Weights,
    vectors: ir.Value,
    candidates: ir.Value,
    name: str,
    matrix: int = 0,
) -> ir.Value:
    """Products with the candidates' rows of a head's matrix: vectors [1, n, heads, E], candidates [1, n, K] ->
    [1, n, heads, K]."""
    flat = b.op("Reshape", candidates, b.ints(1, -1), name=f"{name}.ids")
    weight_name = config.head_name(matrix)
    rows = form_of(weights[weight_name]).gather_many(b, f"{name}.rows", weight_name, flat)
    rows = b.op("Reshape", rows, b.ints(1, -1, config.fast_k or 0, config.n_embd), name=f"{name}.rows.by_token")
    return b.op("FusedMatMul", vectors, rows, name=f"{name}.on_candidates", domain=MSFT, transB=1)


def candidate_logits(
    b: Builder,
    config: DMPTConfig,
    weights: Weights,
    leaf: str,
    heads: Sequence[int],
    moves: Mapping[int, ir.Value],
    candidates: ir.Value,
) -> ir.Value:
    """What projected heads add to the anchor's logits: moves [1, n, E], candidates [1, n, K] -> [1, n, heads, K]."""
    anchor = config.head_allocation[leaf][0]
    name = f"heads.{'_'.join(map(str, heads))}"
    vectors = from_anchor(b, moves, anchor, heads)
    return on_candidates(b, config, weights, vectors, candidates, name, config.matrix_of(leaf, anchor))
