"""Pack codes of a few bits into bytes, and choose block sizes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError

MIN_BLOCK, MAX_BLOCK = 16, 256  # supported by ONNX Runtime's kernels


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack unsigned codes along the last axis, low bits first: (..., L) -> (..., ceil(L * bits / 8)).

    >>> pack(np.array([1, 2, 15], np.uint8), 4).tolist()
    [33, 15]
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return np.ascontiguousarray(codes)
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], missing), np.uint8)], axis=-1)
    out = codes[..., ::per_byte].copy()
    for i in range(1, per_byte):
        out |= codes[..., i::per_byte] << np.uint8(i * bits)
    return out


def unpack(packed: NDArray[np.uint8], bits: int, length: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: (..., bytes) -> (..., length)."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed[..., :length]
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for i in range(per_byte):
        out[..., i::per_byte] = (packed >> np.uint8(i * bits)) & np.uint8(2**bits - 1)
    return out[..., :length]


def fit_block(block: int, width: int) -> int:
    """The block size for rows of `width`: `block`, or the smallest power of two from 16 that covers a narrow row.

    Raises InputError unless `block` is a power of two from 16 to 256.
    """
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise InputError(f"block {block} cannot be used: give a power of two from {MIN_BLOCK} to {MAX_BLOCK}")
    return min(block, max(MIN_BLOCK, 1 << (width - 1).bit_length()))
