"""HQQ: scale and zero point that fit most weights, at the expense of outliers; no calibration.

Minimises sum |x - q|^P over a block, P below 1, by half-quadratic splitting: an auxiliary error e takes the large
errors out of the fit (the soft threshold that belongs to |.|^P), then scale and zero point are fitted to x - e by
least squares. Source: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). They fit
a float zero point to a fixed scale; kernels that look up rows need integer zero points, so the scale is fitted too.

On our models the lower objective does not lower the KL, compared with int4's least squares with zero points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.schemes.blockwise import Found, quantize, round_codes, safe, search

P = 0.7
ROUNDS = 10
BETA, GROWTH = 2.0, 1.01  # penalty that ties e to the error, in units of a step


def int4_hqq(array: NDArray[np.float32], block: int = 32) -> BlockwiseTensor:
    """4 bits with a scale and a zero point per `block` inputs: float32 [N, K]; raises as blockwise.quantize."""
    return quantize(array, 4, block, symmetric=False, scheme="int4-hqq", find=fit)


def fit(x: NDArray[np.float32], bits: int = 4) -> Found:
    """Scale and integer zero point of each block: (B, block) -> (B,), (B,); never worse than the plain search."""
    scale, zero = search(x, bits, symmetric=False)
    step = safe(np.abs(scale))
    x, scale = x / step[:, None], scale / step
    best = [objective(x, scale, zero, bits), scale, zero]
    for i in range(ROUNDS):
        c = round_codes(x, safe(scale)[:, None], zero[:, None], bits)
        target = x - _shrink(x - c * scale[:, None], BETA * GROWTH**i)
        scale, zero = _least_squares(target, c + zero[:, None], scale, bits)
        now = [objective(x, scale, zero, bits), scale, zero]
        best = [np.where(now[0] < best[0], new, old) for new, old in zip(now, best, strict=True)]
    return best[1] * step, best[2]


def objective(
    x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """sum |x - q|^P of each block: (B, block) -> (B,)."""
    c = round_codes(x, safe(scale)[:, None], zero[:, None], bits)
    return (np.abs(x - c * scale[:, None]) ** np.float32(P)).sum(axis=1)


def _shrink(error: NDArray[np.float32], beta: float) -> NDArray[np.float32]:
    """argmin over e of |e|^P + beta / 2 (e - error)^2, by HQQ's closed form for P below 1."""
    size = np.maximum(np.abs(error), np.float32(1e-8))
    return np.sign(error) * np.maximum(size - size ** np.float32(P - 1) / np.float32(beta), 0)


def _least_squares(
    target: NDArray[np.float32], codes: NDArray[np.float32], scale: NDArray[np.float32], bits: int
) -> Found:
    """Fit scale * (codes - zero) to `target` with an integer zero; `scale` stays where all codes are equal."""
    mean, level = codes.mean(axis=1), target.mean(axis=1)
    spread = np.square(codes - mean[:, None]).sum(axis=1)
    slope = ((codes - mean[:, None]) * target).sum(axis=1) / np.where(spread > 0, spread, 1)
    slope = np.where(spread > 0, slope, scale)
    zero = np.rint(mean - level / safe(slope)).clip(0, 2**bits - 1).astype(np.float32)
    c = codes - zero[:, None]
    size = np.square(c).sum(axis=1)
    return np.where(size > 0, (c * target).sum(axis=1) / np.where(size > 0, size, 1), slope), zero
