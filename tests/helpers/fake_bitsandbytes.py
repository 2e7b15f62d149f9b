"""The arithmetic of bitsandbytes' functions in numpy: an oracle for the real ones, and a replacement if missing."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

# Written out here again: the magnitudes of FP4 by bit pattern, NF4 to four digits more than tests need.
MAGNITUDES = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
BOOKS = {
    "fp4": np.array([*MAGNITUDES, *(-m for m in MAGNITUDES)], np.float32),
    "nf4": np.array(
        [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.07958030,
         0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0], np.float32,
    ),
}  # fmt: skip


def quantize_4bit(array: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, Any]:
    """The nearest value of the table, block by block: (packed [ceil(n / 2), 1], state with absmax)."""
    flat = array.numpy().reshape(-1)
    book = BOOKS[quant_type]
    codes, largest = [], []
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        largest.append(np.abs(block).max())
        scaled = block / max(largest[-1], np.float32(1e-38))
        codes.append(np.abs(scaled[:, None] - book).argmin(axis=1))
    zero = [int(np.abs(book).argmin())]
    line = np.concatenate([*codes, *([zero] if flat.size % 2 else [])]).astype(np.uint8)
    packed = torch.from_numpy((line[::2] << 4 | line[1::2])[:, None])
    return packed, SimpleNamespace(absmax=torch.from_numpy(np.array(largest, np.float32)))


def int8_vectorwise_quant(array: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """(codes int8 [N, K], largest magnitudes [N], no outliers)."""
    x = array.numpy()
    largest = np.abs(x).max(axis=1)
    with np.errstate(all="ignore"):  # rows of zeros and nearly zeros become whatever they become
        codes = np.rint(x * (np.float32(127) / largest)[:, None]).astype(np.int8)
    return torch.from_numpy(codes), torch.from_numpy(largest), None


def modules() -> dict[str, ModuleType]:
    """The module to put into sys.modules."""
    package, functional = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.functional")
    package.__spec__ = ModuleSpec("bitsandbytes", None)
    vars(functional).update(quantize_4bit=quantize_4bit, int8_vectorwise_quant=int8_vectorwise_quant)
    return {"bitsandbytes": package, "bitsandbytes.functional": functional}
