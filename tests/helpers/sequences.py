"""Tiny exports of every kind of tree, and texts that are fed to them in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.model import Model
from runtime.sequence import Sequence

CONTEXT, VOCAB = 64, 97
TREES: dict[str, dict[str, Any]] = {
    "none": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4},
    "quad": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1},
}
IDS = np.random.default_rng(3).integers(1, VOCAB, CONTEXT).tolist()
PIECES = (IDS[:17], IDS[17:18], IDS[18:30])  # with splits, some nodes lag behind afterwards


def fed(model: Model, *pieces: list[int]) -> Sequence:
    sequence = model.sequence()
    for piece in pieces:
        sequence.feed(piece)
    return sequence


def assert_equal(a: Sequence, b: Sequence, pieces: list[list[int]]) -> None:
    """Both say the same after every further piece, bit by bit, and the same nodes lag behind."""
    for piece in [[], *pieces]:
        if piece:
            for got, want in zip(a.feed(piece, last=len(piece)), b.feed(piece, last=len(piece)), strict=True):
                np.testing.assert_array_equal(got, want)
        assert a.done == b.done
        np.testing.assert_array_equal(a.tokens, b.tokens)
