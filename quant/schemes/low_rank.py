"""Heads as their anchor plus a low-rank delta, with one left factor for all heads of a leaf.

The heads of a leaf start as copies and stay near each other, so their deltas D_j = W_j - W_anchor are factored jointly:

    [D_1 | D_2 | ...] ~ A [V, r] @ [B_1 | B_2 | ...]        A: 4 bits in blocks, B_j: 8 bits

The best such product takes the leading right singular vectors (Eckart and Young, 1936), which come from the Gram
matrix [n E, n E]; then A is rounded, and B is fitted to the rounded A. (Weighting the error by the heads' inputs on
calibration text, as SVD-LLM does, arXiv 2403.07378, was tried: no gain at rank 16, a tenth of the KL at rank 64.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.form import Form
from quant.schemes.blockwise import check_matrix, int8, quantize
from training.errors import InputError

DELTAS = {f"delta-r{rank}": rank for rank in (16, 32, 64, 128, 256)}  # scheme name in a rule -> rank
BITS = 4  # of the left factor: twice the rank at 4 bits costs less than 8 bits and keeps more
BLOCK = 256  # a row is one block: the columns are first scaled to equal size
RIGHT_BITS, RIGHT_BLOCK = 8, 128  # of the right factors, as in int8
ROWS = 4096  # vocabulary rows processed at a time


def low_rank(
    heads: Sequence[NDArray[np.float32]], anchor: Form, rank: int, block: int = BLOCK
) -> tuple[BlockwiseTensor, list[BlockwiseTensor]]:
    """(left [V, rank], right [rank, E] of every head) for heads [V, E] and their stored anchor.

    Raises InputError for NaN, infinity, deltas beyond 1e19, or a rank that is too high for them.
    """
    for head in heads:
        check_matrix(head)
    vocabulary, width = heads[0].shape
    most = min(vocabulary, width * len(heads))
    if rank > most:
        raise InputError(f"deltas of {len(heads)} heads of {vocabulary} x {width} have rank {most} at most, not {rank}")
    chunks = [slice(start, start + ROWS) for start in range(0, vocabulary, ROWS)]

    def deltas(rows: slice) -> NDArray[np.float32]:
        """[rows, heads * E]."""
        base = anchor.rows(rows)
        return np.concatenate([head[rows] - base for head in heads], axis=1)

    gram = np.zeros((width * len(heads),) * 2)
    for rows in chunks:
        d = deltas(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            gram += d.T @ d
    if not np.isfinite(gram).all():
        raise InputError("the deltas are too large to square in float32")
    vectors = np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]  # [heads * E, rank], the largest first
    scores = np.concatenate([deltas(rows) @ vectors.astype(np.float32) for rows in chunks])  # [V, rank]
    # Scale the columns to equal size, so that one block scale fits all of them. B, fitted below, absorbs the sizes.
    size = np.sqrt(np.square(scores, dtype=np.float64).mean(axis=0)).astype(np.float32)
    scores /= np.where(size, size, np.float32(1))
    left = quantize(scores, BITS, min(block, rank), scheme="int4")
    inner, outer = np.zeros((rank, rank)), np.zeros((rank, width * len(heads)))
    for rows in chunks:
        a = left.rows(rows)
        inner += a.T @ a
        outer += a.T @ deltas(rows)
    fitted = np.linalg.lstsq(inner, outer, rcond=None)[0]  # also where columns of A are zero
    sides = np.split(fitted, len(heads), axis=1)
    return left, [int8(np.ascontiguousarray(side, np.float32), RIGHT_BLOCK) for side in sides]
