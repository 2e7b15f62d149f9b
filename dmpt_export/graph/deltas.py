"""Logits of heads stored as their anchor plus left @ right: the anchor's logits plus a small product.

    h [1, n, E] -- right (of all heads, one MatMulNBits) --> [1, n, heads, r] --+
    candidates [1, n, K] -- gather rows of left, once for all heads --> [1, n, K, r] --+-- product [1, n, heads, K]

The anchor's log-probs serve as its logits: they differ by a constant per position, which the softmax afterwards
cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.builder import MSFT, Builder
from quant.forms.blockwise import BlockwiseTensor
from quant.forms.delta import DeltaTensor
from training.model.config import DMPTConfig


def candidate_logits(
    b: Builder, config: DMPTConfig, heads: Sequence[int], deltas: Sequence[DeltaTensor], h: ir.Value, ids: ir.Value
) -> ir.Value:
    """What `heads` with one left factor add to the anchor's logits: h [1, n, E], ids [1, n, K] -> [1, n, heads, K]."""
    first = deltas[0]
    rank = first.left.shape[1]
    numbers = "_".join(str(j) for j in heads)
    name = f"heads.{numbers}"
    small = stacked(deltas).product(b, f"{name}.right", f"{name}.weight.right", h)  # (1, n, heads * r)
    small = b.op("Reshape", small, b.ints(0, 0, len(heads), rank), name=f"{name}.right.by_head")
    rows = first.left.gather_blocks(b, f"{name}.left", first.left_name, ids)  # (1, n, K, blocks, block)
    rows = b.op("Reshape", rows, b.ints(0, 0, config.fast_k or 0, rank), name=f"{name}.left.rows")
    return b.op("FusedMatMul", small, rows, name=f"{name}.rows", domain=MSFT, transB=1)


def stacked(deltas: Sequence[DeltaTensor]) -> BlockwiseTensor:
    """The right factors of several heads, stacked: [heads * r, E]."""
    rights = [delta.right for delta in deltas]
    if len(rights) == 1:
        return rights[0]
    packed, scales = (np.concatenate([getattr(right, part) for right in rights]) for part in ("packed", "scales"))
    return replace(rights[0], packed=packed, scales=scales, shape=(len(packed), rights[0].shape[1]))
