"""Keys and values of one block, and the mask over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


class KeyValues:
    """Keys and values of one block, each (B, heads, tokens, head_dim); empty at first."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens and return all tokens."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value

    def select(self, rows: Tensor) -> None:
        """Keep the given batch rows, in the given order."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows], self.value[rows]


def causal_mask(real: Tensor, first: int = 0) -> Tensor:
    """Attention mask: (B, T) bool of real tokens -> (B, 1, T - first, T) for the queries from `first` on.

    Every position sees itself, so that a padding row (whose result is unused) has no empty softmax.
    """
    key = torch.arange(real.shape[1], device=real.device)
    query = key[first:, None]
    return (((key <= query) & real[:, None]) | (key == query))[:, None]
