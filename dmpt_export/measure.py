"""Counts of parameters and bytes: in all, and what one decoding step has to read."""

from __future__ import annotations

import numpy as np

from dmpt_export.graph.linear import Weights
from quant.tensor import QuantizedTensor
from training.config import DMPTConfig


def n_parameters(weight: np.ndarray | QuantizedTensor) -> int:
    return int(np.prod(weight.shape))


def owner(name: str) -> str:
    """The part of the model a tensor belongs to: a node's or leaf's blocks, a gate, a head gate, a head, wte, wpe."""
    first, second, *_ = name.split(".")
    if first == "transformer":
        return "transformer" if second in ("h", "ln_f") else f"transformer.{second}"
    return f"{first}.{second}"


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


def touched_per_token(config: DMPTConfig, weights: Weights) -> tuple[int, int]:
    """(parameters, bytes) that one decoding step reads, for the leaf that reads most.

    The trunk, the segments and gates on the leaf's way, one embedding and one position row, the anchor head whole,
    and fast_k rows of each other head (all of it without fast-k).
    """
    by_owner = totals(weights)

    def share(part: str, rows: int | None = None) -> np.ndarray:
        total = np.array(by_owner.get(part, (0, 0)), dtype=np.float64)
        if rows is None or not total[0]:
            return total
        n_rows = config.n_positions if part.endswith("wpe") else config.vocab_size
        return total * rows / n_rows

    def head(j: int) -> str:
        return "transformer.wte" if j == 0 and config.tie_word_embeddings else f"heads.{j}"

    most = np.zeros(2)
    for leaf, turns in config.ways().items():
        on_way = [f"paths.{name}" for name in config.tree if leaf == name or leaf.startswith(f"{name}_")]
        anchor, *others = config.head_allocation[leaf]
        read = share("transformer") + share("transformer.wte", 1) + share("transformer.wpe", 1) + share(head(anchor))
        read = read + sum(share(part) for part in on_way) + sum(share(f"gates.{name}") for name, _ in turns)
        read = read + share(f"head_gates.{leaf}") + sum(share(head(j), config.fast_k) for j in others)
        most = np.maximum(most, read)
    return round(most[0]), round(most[1])
