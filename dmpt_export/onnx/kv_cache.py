"""Scales of an int8 KV cache: one per channel of keys and of values, fixed at export.

    code = round(x / scale) in -128..127,   scale = ROOM * largest |x| seen in calibration / 127

The operator takes fixed scales from the graph, so calibration tokens must be typical of later texts. Each channel has
its own scale because a few channels of GPT-2's keys are far larger than the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmpt_export.onnx.memory import give_back_memory
from training.errors import InputError

if TYPE_CHECKING:
    from training.model.config import DMPTConfig

KV_FLOAT, INT8 = "float", "int8"
KINDS = (KV_FLOAT, INT8)
ROOM = 1.5  # margin for values beyond those seen: of 1, 1.25, 1.5, 2 and 3 it has the least KL on a trained model
SEQUENCES, TOKENS, SEED = 4, 256, 11  # of random ids, used without a text


def calibrate(source: Path, config: DMPTConfig, text: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Scales by name, `<block>.attn.k_scale` and `.v_scale`, float32 [n_embd], from torch with dequantized weights.

    text: token ids [n] for calibration, cut into windows of the context; None: random ids. Raises InputError for a
    text without tokens or with ids beyond the vocabulary.
    """
    largest = _largest(source, windows(config, text))
    give_back_memory(source)
    return {name: np.maximum(values, 1e-6) * np.float32(ROOM / 127) for name, values in largest.items()}


def _largest(source: Path, sequences: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The largest absolute key and value of every channel, by the names of their scales."""
    import torch

    from quant.reference import low_memory_model

    model = low_memory_model(source)
    largest: dict[str, torch.Tensor] = {}

    def note(name: str, qkv: torch.Tensor) -> None:
        keys, values = qkv.detach().abs().amax(dim=(0, 1)).chunk(3)[1:]  # each (E,)
        for part, new in (("k_scale", keys), ("v_scale", values)):
            key = f"{name.removesuffix('.c_attn')}.{part}"
            largest[key] = torch.maximum(largest.get(key, new), new)

    for name, module in model.named_modules():
        if name.endswith(".attn.c_attn"):
            module.register_forward_hook(lambda _module, _input, output, name=name: note(name, output))
    with torch.inference_mode():
        for ids in sequences:
            model.hidden(torch.from_numpy(ids)[None])
    return {name: values.numpy() for name, values in largest.items()}


def windows(config: DMPTConfig, text: np.ndarray | None) -> list[np.ndarray]:
    """Sequences to run: the text's, or random ones; each at most as long as the context."""
    if text is not None:
        read = text[: SEQUENCES * config.n_positions].astype(np.int64)
        if not len(read):
            raise InputError("the calibration text is empty: give some tokens")
        if not 0 <= read.min() <= read.max() < config.vocab_size:
            raise InputError(f"the calibration text has token ids beyond the vocabulary of {config.vocab_size}")
        return [read[start : start + config.n_positions] for start in range(0, len(read), config.n_positions)]
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, config.vocab_size, min(TOKENS, config.n_positions)) for _ in range(SEQUENCES)]
