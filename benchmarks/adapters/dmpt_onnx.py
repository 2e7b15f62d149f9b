"""This project's own ONNX folders, through `runtime`."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import runtime


class DmptOnnx:
    """A loaded folder and one sequence that is reset between turns; see benchmarks.adapters.Adapter."""

    def __init__(self, path: str, threads: int | None, device: str) -> None:
        self.model = runtime.load(Path(path), device=device, threads=threads)
        self.sequence = self.model.sequence()
        self.context, self.vocab_size, self.threads = self.model.context, self.model.vocab_size, self.model.threads

    def prefill(self, ids: list[int]) -> float:
        self.sequence.reset()
        start = perf_counter()
        self.sequence.feed(ids, last=1)
        return perf_counter() - start

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        self.sequence.reset()
        log_probs, _ = self.sequence.feed(ids, last=1)
        fed, taken = [], []
        start = perf_counter()
        for _ in range(n):  # the loop of Model.generate, without sampling, text and a stop at end of text
            token = int(log_probs[0].argmax())
            routes = self.sequence.run([token], log_probs)
            fed.append(token)
            taken.append(int(routes[0]))
        return perf_counter() - start, fed, taken


def load(path: str, threads: int | None, device: str) -> DmptOnnx:
    return DmptOnnx(path, threads, device)
