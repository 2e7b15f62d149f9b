"""Round-to-nearest int8 and int4 with one scale per block of inputs.

The scale of a block is searched: a few trial scales around "the largest value just fits", each followed by
the least-squares scale for the codes it gives; the trial with the smallest squared error stays. With
codes c (zero point taken off) and values x, the best scale is <x,c>/<c,c> and it leaves
||x||^2 - <x,c>^2/<c,c>, so a trial costs one rounding and two dot products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.tensor import QuantizedTensor, fit_block, pack
from training.errors import InputError

CHUNK = 1 << 17  # values handled at a time: the temporaries stay in the processor's cache
TINY = np.finfo(np.float32).tiny  # smaller numbers lose bits

# Trial ranges relative to "the largest value just fits". Symmetric codes reach one step further down than up
# (-8..7), so the largest value is put on the long side; above 1 both signs fit on the short side.
RATIOS: dict[int, tuple[float, ...]] = {
    8: (1.0,),  # clipping never pays: the rounding error is far below any value cut off
    4: (0.70, 0.78, 0.85, 0.90, 0.95, 1.0, 1.05, 1.10, 1.15),
}


def int8(array: NDArray[np.float32], block: int = 128, symmetric: bool = True) -> QuantizedTensor:
    """8 bits with a scale per `block` inputs; see `quantize`."""
    return quantize(array, 8, block, symmetric, scheme="int8")


def int4(array: NDArray[np.float32], block: int = 32, symmetric: bool = True) -> QuantizedTensor:
    """4 bits with a scale per `block` inputs; see `quantize`."""
    return quantize(array, 4, block, symmetric, scheme="int4")


def quantize(
    array: NDArray[np.float32], bits: int, block: int, symmetric: bool = True, scheme: str = ""
) -> QuantizedTensor:
    """Quantize rows in blocks along K, the last one padded with zeros: float32 [N, K] -> QuantizedTensor.

    `block` is a power of two from 16 to 256 and shrinks to cover a narrow row. Asymmetric tensors store an
    integer zero point per block. Raises InputError for NaN, infinity or an impossible block.
    """
    check_matrix(array)
    n, k = array.shape
    block = fit_block(block, k)
    n_blocks = -(-k // block)
    packed = np.empty((n, n_blocks, block * bits // 8), np.uint8)
    scales = np.empty((n, n_blocks), np.float32)
    zeros = np.empty((n, n_blocks), np.uint8)
    step = max(1, CHUNK // (n_blocks * block))
    padded = np.zeros((min(step, n), n_blocks * block), np.float32)
    for start in range(0, n, step):
        stop = min(start + step, n)
        padded[: stop - start, :k] = array[start:stop]
        x = padded[: stop - start].reshape(-1, block)
        scale, zero = (_symmetric if symmetric else _asymmetric)(x, bits)
        codes = _round(x, _safe(scale), zero, bits) + zero[:, None]
        packed[start:stop] = pack(codes.astype(np.uint8), bits).reshape(stop - start, n_blocks, -1)
        scales[start:stop] = scale.reshape(-1, n_blocks)
        zeros[start:stop] = zero.reshape(-1, n_blocks)
    return QuantizedTensor(packed, scales, None if symmetric else pack(zeros, bits), bits, block, (n, k), scheme)


def check_matrix(array: NDArray[Any]) -> None:
    """Raise InputError unless `array` is a finite, non-empty matrix."""
    if array.ndim != 2 or not array.size:
        raise InputError(f"only a matrix can be quantized, not an array of shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InputError("the matrix holds NaN or infinity")


def _symmetric(x: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and the fixed zero point of each block: (B, block) -> (B,), (B,). Scales may be negative."""
    half = np.float32(2 ** (bits - 1))
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    zero = np.full(len(x), half, np.float32)
    trials = [(extreme * np.float32(-ratio) / half, zero) for ratio in RATIOS[bits]]
    return _best(x, trials, bits)


def _asymmetric(x: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and an integer zero point of each block: (B, block) -> (B,), (B,). The range always holds 0."""
    top = np.float32(2**bits - 1)
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    zero = np.rint(-low / _safe((high - low) / top)).clip(0, top)
    trials = [((high - low) * np.float32(ratio) / top, zero) for ratio in RATIOS[bits]]
    return _best(x, trials, bits)


def _best(
    x: NDArray[np.float32], trials: list[tuple[NDArray[np.float32], NDArray[np.float32]]], bits: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The trial that leaves the least squared error, its scale refined by least squares."""
    gain = np.full(len(x), -1, np.float32)
    scale, zero = np.ones(len(x), np.float32), trials[0][1].copy()
    for trial, trial_zero in trials:
        c = _round(x, _safe(trial), trial_zero, bits)
        xc, cc = np.einsum("bk,bk->b", x, c), np.einsum("bk,bk->b", c, c)
        refined = xc / np.maximum(cc, 1)
        better = xc * refined > gain
        gain = np.where(better, xc * refined, gain)
        scale = np.where(better, refined, scale)
        zero = np.where(better, trial_zero, zero)
    # An all-zero block gets scale 0, not 1: kernels subtract zero_point * scale * sum(x) from the sum of the
    # codes, and with a scale far above its neighbours' the rounding of that difference would show.
    return np.where(np.abs(scale) < TINY, np.float32(0), scale), zero


def _safe(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """A divisor: 1 where a scale is too small to divide by, so that codes fall on the zero point."""
    return np.where(np.abs(scale) < TINY, np.float32(1), scale)


def _round(
    x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """Codes with the zero point taken off, as floats: (B, block) -> (B, block)."""
    c = x / scale[:, None]
    np.rint(c, out=c)
    return np.clip(c, -zero[:, None], np.float32(2**bits - 1) - zero[:, None], out=c)
