"""The peer CTranslate2: its own converter for GPT-2 and its Generator, whose decoding loop is in C++.

The vocabulary is "0", "1", ... so that token ids can be fed without a tokenizer. There is no call for a single step:
steps are timed between the callbacks of one greedy generation, from the first token to the last.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.adapters import nothing
from benchmarks.peers.adapters.loop import log_softmax

QUANTIZATION = {"fp32": "float32", "int8": "int8_float32"}


class CTranslate2:
    """A loaded folder, without a sequence kept between turns. See benchmarks.peers.adapters.Adapter."""

    def __init__(self, path: str, threads: int | None) -> None:
        import ctranslate2

        known = json.loads((Path(path) / "sizes.json").read_text(encoding="utf-8"))
        self.context, self.vocab_size = known["context"], known["vocab_size"]
        self.generator = ctranslate2.Generator(path, device="cpu", inter_threads=1, intra_threads=threads or 0)
        self.before_step = nothing
        self.threads = threads or 0  # 0: CTranslate2's default

    def generate(self, ids: list[int], n: int) -> tuple[list[float], list[int]]:
        """Seconds until each of n greedy tokens after `ids` came, from the start or the one before, and the tokens."""
        times: list[float] = []
        tokens: list[int] = []
        start = perf_counter()

        def step(result: Any) -> bool:
            nonlocal start
            times.append(perf_counter() - start)
            tokens.append(int(result.token_id))
            self.before_step()
            start = perf_counter()
            return False

        self.generator.generate_batch(
            [[str(i) for i in ids]], max_length=n, min_length=n, end_token=[], sampling_topk=1,
            include_prompt_in_result=False, callback=step,
        )  # fmt: skip
        if len(tokens) != n:
            raise ValueError(f"CTranslate2 wrote {len(tokens)} tokens of {n}")
        return times, tokens

    def prefill(self, ids: list[int]) -> float:
        times, _ = self.generate(ids, 1)
        return times[0]

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        times, tokens = self.generate(ids, n + 1)
        return sum(times[1:]), tokens[:n], [0] * n

    def score(self, ids: list[int], last: int) -> NDArray[np.float32]:
        logits = np.array(self.generator.forward_batch([ids]), np.float32)  # [1, S, V]
        return log_softmax(logits[0, -last:])


def load(path: str, threads: int | None, device: str) -> CTranslate2:
    return CTranslate2(path, threads)


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Make a CTranslate2 folder from a Hugging Face GPT-2 folder; scheme: fp32, or int8 with a scale per output."""
    from ctranslate2.converters import TransformersConverter

    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            vocabulary = {str(i): i for i in range(config["vocab_size"])}
            return SimpleNamespace(get_vocab=lambda: vocabulary, bos_token="0", eos_token="0", unk_token="0")

    Converter(source).convert(out, quantization=QUANTIZATION[scheme], force=True)
    sizes = {"context": config["n_positions"], "vocab_size": config["vocab_size"]}
    (Path(out) / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    size = (Path(out) / "model.bin").stat().st_size
    # Position embeddings stay float; the tied embedding is quantized and stored once.
    return {"size_bytes": size, "touched_bytes": size - 4 * config["n_positions"] * config["n_embd"]}
