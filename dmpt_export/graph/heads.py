"""Vocabulary heads of a leaf: head gate, full mixture, and fast-k.

h --- anchor (all V logits) --- log-softmax --- TopK ----+---- candidates C, mass M
 \\                                                       |
  +-- rows C of every other head . h -- log-softmax --+   |    (a projected head: rows of the anchor . P h)
  +-- head gate -- log pi ----------------------------+-> logsumexp + log M -> scatter into the anchor's log-probs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.builder import Builder, Spec
from dmpt_export.graph.linear import float_weight, project
from dmpt_export.graph.projected import head_input, projections
from dmpt_export.graph.rescore import candidate_logits, groups
from quant.forms.weights import Weights, form_of
from training.model.config import DMPTConfig

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def leaf_log_probs(
    b: Builder, config: DMPTConfig, weights: Weights, leaf: str, h: ir.Value
) -> tuple[ir.Value, ir.Value | None]:
    """log P_leaf and log pi in float32: normalised hidden rows [1, n, E] -> [1, n, V] and [n, H].

    A single head also takes [B, N, E] and has no log pi.
    """
    anchor, *others = config.head_allocation[leaf]
    name = f"mixture.{leaf}"
    moves = projections(b, config, weights, leaf, h)
    log_anchor = log_softmax(b, _full_logits(b, config, weights, leaf, anchor, h, moves), f"heads.{anchor}")
    if not others:
        return log_anchor, None
    rows = b.op("Reshape", h, b.ints(-1, config.n_embd), name=f"{name}.rows")
    log_pi = head_log_weights(b, config, weights, leaf, rows)  # (n, H)
    if config.fast_k is None:
        weight_of = [_column(b, log_pi, i, f"{name}.log_pi.{i}") for i in range(1 + len(others))]  # each (n, 1)
        parts = [b.op("Add", log_anchor, weight_of[0], name=f"{name}.part")]
        for log_w, j in zip(weight_of[1:], others, strict=True):
            full = _full_logits(b, config, weights, leaf, j, h, moves)
            if j not in moves and form_of(weights[config.head_name(j)]).adds_to_anchor:
                full = b.op("Add", log_anchor, to_float(b, full, f"heads.{j}"), name=f"heads.{j}.deltas")
            full = log_softmax(b, full, f"heads.{j}")
            parts.append(b.op("Add", full, log_w, name=f"{name}.part"))
        return _log_sum_exp(b, parts, name), log_pi

    def score(candidates: ir.Value) -> list[tuple[ir.Value, bool]]:
        return [
            candidate_logits(b, config, weights, leaf, group, h, moves, candidates)
            for group in groups(config, weights, leaf)
        ]

    return fast_mixture(b, config.fast_k, name, log_anchor, log_pi, score, f"routed_{leaf}"), log_pi


def fast_mixture(
    b: Builder,
    fast_k: int,
    name: str,
    log_anchor: ir.Value,
    log_pi: ir.Value,
    score: Callable[[ir.Value], list[tuple[ir.Value, bool]]],
    rows: str | None = None,
) -> ir.Value:
    """The anchor's log-probs [1, n, V] with the mixture on its candidates: log_pi [n, H] -> [1, n, V].

    rows: name of the dimension n where it may be 0. score: candidates [1, n, K] -> the other heads' logits, in order,
    each [1, n, heads, K] and whether they are to be added to the anchor's.
    """
    log_c, candidates = top_k(b, log_anchor, fast_k, f"{name}.candidates", (1, rows) if rows else None)
    mass = b.op("ReduceLogSumExp", log_c, b.ints(2), name=f"{name}.mass", keepdims=1)
    # The anchor's log-probs of the candidates serve as its logits: normalised over them, they are log_c - mass.
    anchors = b.op("Unsqueeze", log_c, b.ints(2), name=f"{name}.anchor")
    logits = []
    for part, adds in score(candidates):
        part = to_float(b, part, name)
        logits.append(b.op("Add", part, anchors, name=f"{name}.deltas") if adds else part)
    within = b.op("Concat", anchors, *logits, name=f"{name}.logits", axis=2)  # (1, n, H, K)
    mixed = mix(b, within, log_pi, name)
    log_c = b.op("Add", mass, mixed, name=f"{name}.log_c")
    return b.op("ScatterElements", log_anchor, candidates, log_c, name=name, axis=2)


def top_k(b: Builder, x: ir.Value, k: int, name: str, rows: tuple[int | str, ...] | None) -> Sequence[ir.Value]:
    """(values, indices) of the k largest in the last axis, in any order: float [*rows, m] -> [*rows, k].

    rows: where there may be none, as in a leaf that no row takes. ONNX Runtime before 1.31 divides by their number,
    which ends the process. Each leaf needs a name of its own for its rows: equal names share a buffer.
    """

    def search(inner: Builder) -> Sequence[ir.Value]:
        return inner.ops("TopK", x, inner.ints(k), name=name, outputs=2, axis=-1, sorted=0)

    if rows is None:
        return search(b)
    values, indices = Spec(f"{name}.values", FLOAT, (*rows, k)), Spec(f"{name}.indices", INT64, (*rows, k))
    any_rows = b.op("Cast", b.op("Size", x, name=f"{name}.size"), name=f"{name}.any", to=int(ir.DataType.BOOL))
    return b.branch(
        any_rows,
        search,
        lambda inner: [inner.nothing(values), inner.nothing(indices)],
        [values, indices],
        name=f"{name}.if_any",
    )


def mix(b: Builder, logits: ir.Value, log_pi: ir.Value, name: str) -> ir.Value:
    """log of the heads' mixture over the last axis: logits [1, n, H, m], log_pi [n, H] -> [1, n, m]."""
    parts = b.op("LogSoftmax", logits, name=f"{name}.log_softmax", axis=-1)
    weighed = b.op("Add", parts, b.op("Unsqueeze", log_pi, b.ints(2), name=f"{name}.log_pi"), name=f"{name}.weighed")
    return b.op("ReduceLogSumExp", weighed, b.ints(2), name=f"{name}.within", keepdims=0)


def _full_logits(
    b: Builder,
    config: DMPTConfig,
    weights: Weights,
    leaf: str,
    j: int,
    h: ir.Value,
    moves: Mapping[int, ir.Value],
) -> ir.Value:
    """Vocabulary logits of a head, or what a delta adds to the anchor's: [1, n, E] -> [1, n, V]."""
    matrix = config.head_name(config.matrix_of(leaf, j)).removesuffix(".weight")
    return project(b, weights, matrix, head_input(b, moves, j, h))


def head_log_weights(b: Builder, config: DMPTConfig, weights: Weights, leaf: str, h: ir.Value) -> ir.Value:
    """log pi over the leaf's heads: [n, E] -> [n, H], float32; -inf for heads that head_topk leaves out."""
    prefix = f"head_gates.{leaf}"
    logits = gate_mlp(b, weights, prefix, h, "Gelu")  # exact GELU here, the tanh form in blocks
    temperature = b.weight("const.head_gate_temp", np.array(config.head_gate_temp, np.float32))
    logits = b.op("Div", logits, temperature, name=f"{prefix}.tempered")
    n_heads = len(config.head_allocation[leaf])
    if config.head_topk and config.head_topk < n_heads:
        kept, which = top_k(
            b, logits, config.head_topk, f"{prefix}.topk", (f"routed_{leaf}",) if config.splits else None
        )
        lowest = b.weight("const.minus_inf", np.array([-np.inf], np.float32))
        shape = b.op("Shape", logits, name=f"{prefix}.shape")
        dropped = b.op("Expand", lowest, shape, name=f"{prefix}.dropped")
        logits = b.op("ScatterElements", dropped, which, kept, name=f"{prefix}.kept", axis=1)
    return log_softmax(b, logits, prefix)


def gate_mlp(b: Builder, weights: Weights, prefix: str, x: ir.Value, activation: str) -> ir.Value:
    """Linear, activation, Linear: the form of gates (Tanh) and head gates (Gelu); weights [out, in]; float32 out."""

    def dense(i: int, y: ir.Value) -> ir.Value:
        weight, bias = (float_weight(b, weights, f"{prefix}.{i}.{part}") for part in ("weight", "bias"))
        return b.op("Gemm", y, weight, bias, name=f"{prefix}.{i}", transB=1)

    return to_float(b, dense(2, b.op(activation, dense(0, x), name=f"{prefix}.1")), prefix)


def to_float(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """Cast to float32: choices and log-probs are float32 for any activation type."""
    if b.dtype == ir.DataType.FLOAT:
        return x
    return b.op("Cast", x, name=f"{name}.float", to=int(ir.DataType.FLOAT))


def log_softmax(b: Builder, logits: ir.Value, name: str) -> ir.Value:
    return b.op("LogSoftmax", to_float(b, logits, name), name=f"{name}.log_softmax", axis=-1)


def _column(b: Builder, x: ir.Value, i: int, name: str) -> ir.Value:
    return b.op("Gather", x, b.ints(i), name=name, axis=1)


def _log_sum_exp(b: Builder, parts: list[ir.Value], name: str) -> ir.Value:
    """log of the sum of exponentials of [n, m] tensors of equal shape, safe if one of them is -inf."""
    stacked = [b.op("Unsqueeze", part, b.ints(0), name=f"{name}.stack") for part in parts]
    together = b.op("Concat", *stacked, name=f"{name}.parts", axis=0)
    return b.op("ReduceLogSumExp", together, b.ints(0), name=f"{name}.logsumexp", keepdims=0)
