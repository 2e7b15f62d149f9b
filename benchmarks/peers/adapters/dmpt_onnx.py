"""This project's own ONNX folders, through `runtime`."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import runtime
from benchmarks.peers.adapters import nothing


class DmptOnnx:
    """A loaded folder and a sequence that is reset between turns; see benchmarks.peers.adapters.Adapter."""

    def __init__(self, path: str, threads: int | None, device: str) -> None:
        self.model = runtime.load(Path(path), device=device, threads=threads)
        self.sequence = self.model.sequence()
        self.context, self.vocab_size, self.threads = self.model.context, self.model.vocab_size, self.model.threads
        self.before_step = nothing
        self.native_s: float | None = None
        self.inside_s = 0.0
        self.engine_run = self.model.engine.run
        self.model.engine.run = self.timed_run  # type: ignore[method-assign]

    def timed_run(self, *arguments: Any, **named: Any) -> None:
        """Wrap the engine's run to sum its time; the rest of a step is Python's. Costs 0.2 us per call."""
        start = perf_counter()
        self.engine_run(*arguments, **named)
        self.inside_s += perf_counter() - start

    def prefill(self, ids: list[int]) -> float:
        self.sequence.reset()
        start = perf_counter()
        self.sequence.feed(ids, last=1)
        return perf_counter() - start

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        self.sequence.reset()
        log_probs = np.empty((1, self.vocab_size), np.float32)
        # All paths process the untimed context; otherwise the catch-up of a path would be part of a timed step.
        self.sequence.run(ids, log_probs, every_node=True)
        fed, taken = [], []
        self.inside_s, seconds = 0.0, 0.0
        for _ in range(n):  # the loop of Model.generate without sampling, text and the stop at end of text
            self.before_step()
            start = perf_counter()
            token = int(log_probs[0].argmax())
            routes = self.sequence.run([token], log_probs)
            fed.append(token)
            taken.append(int(routes[0]))
            seconds += perf_counter() - start
        self.native_s = self.inside_s
        return seconds, fed, taken

    def score(self, ids: list[int], last: int) -> NDArray[np.float32]:
        return self.model.score(ids, last)[0]


def load(path: str, threads: int | None, device: str) -> DmptOnnx:
    return DmptOnnx(path, threads, device)
