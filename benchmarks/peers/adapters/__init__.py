"""Runtimes that can be timed, one small module each, with one function `load(path, threads, device) -> Adapter`.

A module that wraps a peer (benchmarks.peers.registry) also has `convert(source, out, scheme) -> facts`, which makes a
folder that its `load` takes from a Hugging Face GPT-2 folder and says at least how large the weights are and how many
bytes of them a token touches (all but the position embedding), {"size_bytes", "touched_bytes"};
benchmarks.peers.registry keeps that in the folder's FACTS. Both run in a process of their own
(benchmarks.speed.worker), perhaps of another Python.
"""

from __future__ import annotations

from typing import Any, Protocol

FACTS = "facts.json"  # in a converted folder: what the conversion said, and the versions that made it


class Adapter(Protocol):
    """What benchmarks.speed.worker needs of a loaded model. Times are seconds of the calls alone."""

    context: int  # longest sequence, in tokens
    vocab_size: int
    threads: int
    native_s: float | None  # may be absent. Of the last decode: seconds spent outside Python

    def prefill(self, ids: list[int]) -> float:
        """Time to feed a whole prompt into an empty sequence."""
        ...

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        """Feed `ids` untimed, then time `n` greedy one-token steps: (seconds, tokens fed, leaf index of each)."""
        ...

    def score(self, ids: list[int], last: int) -> Any:
        """May be absent. Log-probs of the token after each of the last `last` of `ids`: float32 [last, vocab]."""
        ...
