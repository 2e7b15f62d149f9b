"""The peer Transformers: GPT2LMHeadModel in torch, float32 or bfloat16, with its own cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.adapters import FACTS
from benchmarks.peers.adapters.loop import Stepwise

BYTES = {"fp32": 4, "bf16": 2}  # of a weight, by scheme


class Transformers(Stepwise):
    """A model and its growing cache. Steps call forward(), without generate()'s loop."""

    def __init__(self, model: Any, threads: int | None) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.torch, self.model, self.past = torch, model.eval(), None
        self.context, self.vocab_size = model.config.n_positions, model.config.vocab_size
        self.threads = int(torch.get_num_threads())

    def reset(self) -> None:
        self.past = None

    def rows(self, ids: list[int], last: int) -> NDArray[np.float32]:
        """Logits after the last `last` of `ids`, fed to the sequence: [last, V]."""
        with self.torch.inference_mode():
            batch = self.torch.tensor([ids])
            out = self.model(batch, past_key_values=self.past, use_cache=True, logits_to_keep=last)
            self.past = out.past_key_values
            found: NDArray[np.float32] = out.logits[0].float().numpy()
        return found

    def feed(self, ids: list[int]) -> NDArray[np.float32]:
        return self.rows(ids, 1)[0]

    def logits(self, ids: list[int], last: int) -> NDArray[np.float32]:
        self.reset()
        return self.rows(ids, last)


def load(path: str, threads: int | None, device: str) -> Transformers:
    import torch
    from transformers import GPT2LMHeadModel

    facts = json.loads((Path(path) / FACTS).read_text(encoding="utf-8"))
    model = GPT2LMHeadModel.from_pretrained(facts["source"], local_files_only=True, use_safetensors=True)
    return Transformers(model.to(torch.bfloat16) if facts["scheme"] == "bf16" else model.float(), threads)


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Nothing to convert: stores only the folder's path. A step reads all weights but the positions."""
    from safetensors import safe_open

    Path(out).mkdir(parents=True, exist_ok=True)
    weights = positions = 0
    with safe_open(Path(source) / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            n = int(np.prod(file.get_slice(name).get_shape()))
            weights, positions = weights + n, positions + n * name.endswith("wpe.weight")
    size = BYTES[scheme] * weights
    return {
        "source": source,
        "scheme": scheme,
        "size_bytes": size,
        "touched_bytes": size - BYTES[scheme] * positions,
    }
