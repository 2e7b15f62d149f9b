"""Counts of parameters and bytes: in total, and read by one decoding step.

Parameters do not depend on storage: a 4-bit matrix or a low-rank delta counts as the matrix it stands for, so a
quantized model has as many as the float one. Bytes are stored bytes.
"""

from __future__ import annotations

import numpy as np

from quant.forms.weights import Weight, Weights, form_of
from training.model.config import DMPTConfig


def n_parameters(weight: Weight) -> int:
    return int(np.prod(weight.shape))


def owner(name: str) -> str:
    """The part of the model a tensor belongs to: the trunk's blocks (transformer.h), a node, a gate, a head gate, a
    head, the embedding (transformer.wte) and so on."""
    return ".".join(name.split(".")[:2])


def totals(weights: Weights) -> dict[str, tuple[int, int]]:
    """(parameters, bytes) by owner."""
    out: dict[str, tuple[int, int]] = {}
    for name, weight in weights.items():
        count, size = out.get(owner(name), (0, 0))
        out[owner(name)] = (count + n_parameters(weight), size + weight.nbytes)
    return out


def parts_table(weights: Weights) -> dict[str, dict[str, int]]:
    """totals() in the manifest's form."""
    return {part: {"parameters": count, "bytes": size} for part, (count, size) in totals(weights).items()}


def touched_per_token(config: DMPTConfig, weights: Weights, every_path: bool = False) -> tuple[int, int]:
    """(parameters, bytes) that one decoding step reads, see DMPTConfig.touched_per_token."""
    parameters = {name: n_parameters(weight) for name, weight in weights.items()}
    unread = config.vocab_size / config.fast_k - 1 if config.fast_k else 0.0  # unread rows per read row
    sizes = {name: weight.nbytes + round(form_of(weight).whole_bytes * unread) for name, weight in weights.items()}
    return config.touched_per_token(parameters, every_path), config.touched_per_token(sizes, every_path)
