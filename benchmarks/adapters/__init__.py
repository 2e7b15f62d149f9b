"""Runtimes that can be timed, one small module each, with one function `load(path, threads, device) -> Adapter`."""

from __future__ import annotations

from typing import Protocol


class Adapter(Protocol):
    """What benchmarks.worker needs of a loaded model. Times are seconds of the calls alone."""

    context: int  # longest sequence, in tokens
    vocab_size: int
    threads: int

    def prefill(self, ids: list[int]) -> float:
        """Time to feed a whole prompt into an empty sequence."""
        ...

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        """Feed `ids` untimed, then time `n` greedy one-token steps: (seconds, tokens fed, leaf index of each)."""
        ...
