"""Training sequences from one long token array, in an order that depends only on the seed and the position."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.errors import FieldError


class TokenBatches:
    """Consecutive, non-overlapping sequences of `length` predictions, reshuffled in every pass.

    Sequences come from the same token stream that evaluation reads (documents joined by end-of-text); an incomplete
    last sequence is left out. The order is a function of (seed, pass), so the position is the only state that resuming
    needs. Raises InputError when the text is too short for one sequence.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        if len(tokens) < length + 1:
            raise FieldError(
                "the training text has {} tokens, one sequence needs {}: give more text or a smaller {max_length}",
                len(tokens), length + 1,
            )  # fmt: skip
        # A strided view: nothing is copied until a batch is taken, even from a memory-mapped file.
        self.rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
        self.seed = seed
        self.labels: NDArray[np.int16] | None = None  # the domain of each sequence; None: a text without domains
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Sequences in one pass."""
        return len(self.rows)

    def order(self, epoch: int) -> np.ndarray:
        """The order of pass `epoch`, a permutation of the sequences."""
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows)))
        return self._order[1]

    def places(self, position: int, count: int) -> list[int]:
        """Which sequences `count` from `position` on are, counted over all passes."""
        where = [divmod(i, len(self.rows)) for i in range(position, position + count)]
        return [int(self.order(epoch)[i]) for epoch, i in where]

    def take(self, position: int, count: int) -> Tensor:
        """`count` sequences from `position` on: int64 (count, length + 1)."""
        return torch.from_numpy(np.stack([self.rows[i] for i in self.places(position, count)]).astype(np.int64))

    def sample(self) -> Tensor:
        """One sequence, always the same: int64 (1, length + 1)."""
        return torch.from_numpy(self.rows[:1].astype(np.int64))

    def domains(self, position: int, count: int) -> Tensor | None:
        """The domains of these sequences: int64 (count,); None for a text without domains."""
        return None if self.labels is None else torch.from_numpy(self.labels[self.places(position, count)]).long()
