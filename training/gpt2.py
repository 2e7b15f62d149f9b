"""Hugging Face GPT-2 folders read as a DMPT without splits and with one head. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from training.errors import InputError
from training.shape import ROOT, Shape

COPIED = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
# Fields that would change what the network computes: only GPT-2's own value is supported.
FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# Causal-mask buffers that older folders carry; the mask is the model's own.
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")


def gpt2_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a DMPT from a GPT-2's config.json. Raises InputError for variants that compute otherwise."""
    for name, only in FIXED.items():
        if fields.get(name, only) != only:
            raise InputError(f"{name} is {fields[name]}: only GPT-2's own {only} is supported")
    if fields.get("quantization_config"):
        raise InputError("this model was quantized by another tool: give the float model it was made from")
    copied = {name: fields[name] for name in COPIED if name in fields}
    vocab_size = fields.get("vocab_size", Shape.vocab_size)
    for name in ("bos_token_id", "eos_token_id"):  # transformers leaves GPT-2's own 50256 in models of any vocabulary
        token = fields.get(name, Shape.eos_token_id)
        copied[name] = token if token is not None and token < vocab_size else None
    return {**copied, "splits": [], "head_allocation": {ROOT: [0]}}


def dmpt_name(name: str, *, tied: bool) -> str | None:
    """The contract's name of a GPT-2 tensor; None for one that is not read (buffers, the tied head's copy).

    >>> dmpt_name("h.0.ln_1.weight", tied=True)
    'transformer.h.0.ln_1.weight'
    """
    if name == "lm_head.weight":
        return None if tied else "heads.0.weight"
    full = name if name.startswith("transformer.") else f"transformer.{name}"
    return None if BUFFERS.fullmatch(full) else full
