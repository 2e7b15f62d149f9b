"""Adapters for runtimes to be timed: one small module each, with a function `load(path, threads, device) -> Adapter`.

The module of a peer (benchmarks.peers.registry) also has `convert(source, out, scheme) -> facts`. It converts a Hugging
Face GPT-2 folder to a folder for `load` and returns at least {"size_bytes", "touched_bytes"}: the size of the weights
and the bytes of them that a token touches (all but the position embedding). benchmarks.peers.registry stores this in
the folder's FACTS. Both functions run in a separate process (benchmarks.speed.worker), possibly in another Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

FACTS = "facts.json"  # in a converted folder: the facts of the conversion, and the versions that made it


def nothing() -> None:
    """before_step of a decode that only measures."""


class Adapter(Protocol):
    """The interface of a loaded model for benchmarks.speed.worker. Times are seconds of the calls alone."""

    context: int  # longest sequence, in tokens
    vocab_size: int
    threads: int
    native_s: float | None  # optional: seconds of the last decode spent outside Python
    before_step: Callable[[], None]  # set by the worker: decode() calls it before every step, outside the time

    def prefill(self, ids: list[int]) -> float:
        """Time to feed a whole prompt into an empty sequence."""
        ...

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        """Feed `ids` untimed, then time `n` greedy one-token steps: (seconds, tokens fed, leaf index of each)."""
        ...

    def score(self, ids: list[int], last: int) -> Any:
        """Optional. Log-probs of the token after each of the last `last` of `ids`: float32 [last, vocab]."""
        ...
