"""The domain of every training sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError

NONE = -1  # the domain of text that has none


@dataclass(frozen=True)
class Domains:
    """The domain of every token of a training text, as consecutive pieces."""

    names: tuple[str, ...]
    pieces: tuple[tuple[int, int], ...]  # (tokens, index of the name or NONE)

    def of_windows(self, count: int, length: int) -> NDArray[np.int16]:
        """The domain of consecutive windows of `length` tokens, int16 [count]; NONE where a window has two."""
        ends = np.cumsum([tokens for tokens, _ in self.pieces])
        starts = np.arange(count) * length
        first, last = (np.searchsorted(ends, where, side="right") for where in (starts, starts + length - 1))
        labels = np.array([label for _, label in self.pieces], np.int16)
        return np.where(labels[first] == labels[last], labels[first], np.int16(NONE))


def joined(parts: Sequence[tuple[str | None, NDArray[np.int32]]]) -> tuple[NDArray[np.int32], Domains]:
    """One text of several: (domain or None, tokens [n]) -> tokens, domains. Raises InputError for an empty domain."""
    names = tuple(dict.fromkeys(name for name, _ in parts if name is not None))
    for name in names:
        if not any(len(tokens) for own, tokens in parts if own == name):
            raise InputError(f"domain '{name}' has no text")
    pieces = tuple((len(tokens), NONE if name is None else names.index(name)) for name, tokens in parts if len(tokens))
    return np.concatenate([tokens for _, tokens in parts]), Domains(names, pieces)
