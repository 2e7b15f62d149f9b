"""Read nanoGPT's ckpt.pt: GPT-2 with transposed linear weights.

The file holds `model` (tensors) and `model_args` (n_layer, n_head, n_embd, block_size, bias, vocab_size). Linear
weights are stored [out, in], and a model with `bias` false has no biases. It uses the exact GELU (nn.GELU), not
GPT-2's tanh form. Source: github.com/karpathy/nanoGPT, model.py and train.py (MIT, A. Karpathy 2022).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoints.checkpoint import TIED_HEAD, Checkpoint, check_tensors, expected_shapes
from training.checkpoints.tensors import as_float32
from training.errors import InputError
from training.model.config import DMPTConfig
from training.model.fields import SIZE
from training.model.shape import ROOT

SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions"}
LINEAR = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")
LM_HEAD = "lm_head.weight"
GPT2_VOCABULARY = 50257  # nanoGPT rounds it up to 50,304


def from_nanogpt(path: Path, state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> tuple[Checkpoint, list[str]]:
    """A checkpoint and notes for the user. state: tensors without wrapper prefixes; sizes: `model_args`.

    Raises InputError for sizes that are missing or do not fit the tensors (all named at once).
    """
    for name in SIZES:
        if not SIZE.fits(sizes.get(name)):
            raise InputError(f"{path}: model_args.{name} must be {SIZE.words}, not {sizes.get(name)!r}")
    embedding = state.get("transformer.wte.weight")
    if embedding is None:
        raise InputError(f"{path} holds no transformer.wte.weight: it is not a nanoGPT checkpoint")
    end = GPT2_VOCABULARY - 1 if len(embedding) >= GPT2_VOCABULARY else None
    notes = ["nanoGPT checkpoint; activation_function is the exact gelu, as in its code since March 2023"]
    head = state.get(LM_HEAD)
    tied = head is None or torch.equal(head, embedding)
    if not tied:
        notes.append("lm_head.weight differs from the embedding: kept as a separate head")
    config = DMPTConfig(
        vocab_size=len(embedding),
        **{ours: sizes[name] for name, ours in SIZES.items()},
        activation_function="gelu",
        head_allocation={ROOT: [0]},
        tie_word_embeddings=tied,
        bos_token_id=end,
        eos_token_id=end,
    )
    tensors = {}
    for name, tensor in state.items():
        new = TIED_HEAD if name == LM_HEAD else name
        if not (tied and new == TIED_HEAD):
            value = as_float32(path, name, tensor)
            tensors[new] = (value.T if LINEAR.fullmatch(name) else value).contiguous()
    if not sizes.get("bias", True):
        notes.append("trained without biases: they are zero")
        absent = {name: shape for name, shape in expected_shapes(config).items() if name.endswith(".bias")}
        tensors |= {name: torch.zeros(shape) for name, shape in absent.items() if name not in tensors}
    check_tensors(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    return Checkpoint(config, tensors, path.parent), notes
