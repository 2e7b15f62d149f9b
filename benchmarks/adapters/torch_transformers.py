"""The peer that everybody has: Transformers' GPT2LMHeadModel in torch, float32, with its own cache."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.adapters import FACTS


class Transformers:
    """A loaded folder; see benchmarks.adapters.Adapter. Steps call forward(), without generate()'s loop."""

    def __init__(self, path: str, threads: int | None) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        if threads:
            torch.set_num_threads(threads)
        source = json.loads((Path(path) / FACTS).read_text(encoding="utf-8"))["source"]
        self.torch = torch
        self.model = GPT2LMHeadModel.from_pretrained(source).eval()
        self.context, self.vocab_size = self.model.config.n_positions, self.model.config.vocab_size
        self.threads = int(torch.get_num_threads())

    def feed(self, ids: list[int], past: Any = None, last: int = 1) -> Any:
        with self.torch.inference_mode():
            batch = self.torch.tensor([ids])
            return self.model(batch, past_key_values=past, use_cache=True, logits_to_keep=last)

    def prefill(self, ids: list[int]) -> float:
        start = perf_counter()
        self.feed(ids)
        return perf_counter() - start

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        out = self.feed(ids)
        fed: list[int] = []
        start = perf_counter()
        for _ in range(n):
            fed.append(int(out.logits[0, -1].argmax()))
            out = self.feed(fed[-1:], out.past_key_values)
        return perf_counter() - start, fed, [0] * n

    def score(self, ids: list[int], last: int) -> NDArray[np.float32]:
        logits = self.feed(ids, last=last).logits[0]
        found: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return found


def load(path: str, threads: int | None, device: str) -> Transformers:
    return Transformers(path, threads)


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Nothing to convert: only where the folder lies is kept. A step reads all weights but the positions."""
    Path(out).mkdir(parents=True, exist_ok=True)
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    size = (Path(source) / "model.safetensors").stat().st_size
    touched = size - 4 * config["n_positions"] * config["n_embd"]
    return {"source": source, "size_bytes": size, "touched_bytes": touched}
