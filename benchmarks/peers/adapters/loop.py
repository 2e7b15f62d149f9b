"""The turns of all peers, built on two methods that differ: start an empty sequence, and feed tokens to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.adapters import nothing


class Stepwise(ABC):
    """benchmarks.peers.adapters.Adapter for a runtime that takes ids and keeps the sequence itself."""

    context: int
    vocab_size: int
    threads: int
    before_step: Callable[[], None] = staticmethod(nothing)
    native_s: float | None = None  # summed in feed() by a subclass that can separate its own time from Python's

    @abstractmethod
    def reset(self) -> None:
        """Start an empty sequence."""

    @abstractmethod
    def feed(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits after the last of `ids`: [V], valid until the next call."""

    @abstractmethod
    def logits(self, ids: list[int], last: int) -> NDArray[np.float32]:
        """Logits after each of the last `last` of `ids`, fed into an empty sequence: [last, V]."""

    def prefill(self, ids: list[int]) -> float:
        self.reset()
        start = perf_counter()
        self.feed(ids)
        return perf_counter() - start

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        self.reset()
        logits = self.feed(ids)
        fed: list[int] = []
        if self.native_s is not None:
            self.native_s = 0.0
        seconds = 0.0
        for _ in range(n):
            self.before_step()
            start = perf_counter()
            fed.append(int(logits.argmax()))
            logits = self.feed(fed[-1:])
            seconds += perf_counter() - start
        return seconds, fed, [0] * n

    def score(self, ids: list[int], last: int) -> NDArray[np.float32]:
        return log_softmax(self.logits(ids, last))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-softmax over the last axis, in float64: no further loss for peers with half-precision logits."""
    wide = logits.astype(np.float64)
    return (wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)).astype(np.float32)
