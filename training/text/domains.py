"""The domain of every token of a training text, and of every training sequence."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError

NONE = -1  # the domain of text that has none


@dataclass(frozen=True, eq=False)
class Domains:
    """The domains of a text's tokens, as consecutive pieces."""

    names: tuple[str, ...]
    ends: NDArray[np.int64]  # [pieces], in tokens
    labels: NDArray[np.int16]  # [pieces], index of the name or NONE

    @classmethod
    def of(cls, names: Sequence[str], pieces: Sequence[tuple[int, int]]) -> Domains:
        """pieces: (tokens, label)."""
        ends = np.cumsum([tokens for tokens, _ in pieces], dtype=np.int64)
        return cls(tuple(names), ends, np.array([label for _, label in pieces], np.int16))

    def of_windows(self, count: int, length: int) -> NDArray[np.int16]:
        """The domain of consecutive windows of `length` tokens, int16 [count]; NONE where a window has several.

        Raises InputError when the pieces are shorter than the windows.
        """
        if count * length > (self.ends[-1] if len(self.ends) else 0):
            raise InputError(f"the domains end before token {count * length}: they belong to another text")
        last_of_run = np.append(self.labels[1:] != self.labels[:-1], True)  # neighbours of one domain are one piece
        ends, labels = self.ends[last_of_run], self.labels[last_of_run]
        starts = np.arange(count) * length
        first, last = (np.searchsorted(ends, where, side="right") for where in (starts, starts + length - 1))
        return np.where(first == last, labels[first], np.int16(NONE))

    def crc32(self) -> str:
        """Identifies names, pieces and labels."""
        found = zlib.crc32(" ".join(self.names).encode())
        for array in (self.ends, self.labels):
            found = zlib.crc32(np.ascontiguousarray(array).data, found)
        return f"{found:08x}"


def joined(parts: Sequence[tuple[str | None, NDArray[np.int32]]]) -> tuple[NDArray[np.int32], Domains]:
    """One text of several: (domain or None, tokens [n]) -> tokens, domains. Raises InputError for an empty domain."""
    names = tuple(dict.fromkeys(name for name, _ in parts if name is not None))
    for name in names:
        if not any(len(tokens) for own, tokens in parts if own == name):
            raise InputError(f"domain '{name}' has no text: give it a file with text, or leave it out")
    pieces = [(len(tokens), NONE if name is None else names.index(name)) for name, tokens in parts if len(tokens)]
    return np.concatenate([tokens for _, tokens in parts]), Domains.of(names, pieces)
