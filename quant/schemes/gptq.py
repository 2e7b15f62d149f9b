"""GPTQ: round one input after another; the weights of later inputs compensate for the error.

It minimises the error of the products, not of the weights: tr(D H D^T) with D = W - Q and H = the sum of x x^T over
calibration rows x. When the weights of input j are rounded, the best change of those not yet rounded is
-(error / R_jj) R_j, with H^-1 = R^T R and R upper triangular. A block's scale is searched when the block is reached,
for its weights after all changes so far; the stored layout is that of plain rounding.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ" (2022), arXiv 2210.17323. Inputs are processed in their stored
order and come from the float model: on our models neither the order by size ("act-order", which must fix the scales
beforehand) nor inputs from already quantized layers gave better results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.packing import fit_block
from quant.schemes.blockwise import Store, check_matrix, quantize, round_codes, safe, search
from training.errors import FieldError, InputError

if TYPE_CHECKING:
    from quant.calibration import Inputs

DAMPING = 0.01  # share of H's mean diagonal added to it: keeps inputs that calibration rarely saw from diverging
ROWS = 2048  # output rows at a time, so that a block of them fits the processor's cache


def int4_gptq(
    array: NDArray[np.float32], block: int = 32, symmetric: bool = True, inputs: Inputs | None = None
) -> BlockwiseTensor:
    """4 bits with a scale per `block` inputs; see `gptq`."""
    return gptq(array, 4, block, symmetric, inputs, scheme="int4-gptq")


def int3_gptq(
    array: NDArray[np.float32], block: int = 32, symmetric: bool = True, inputs: Inputs | None = None
) -> BlockwiseTensor:
    """3 bits in the 4-bit fields that kernels read, with a scale per `block` inputs; see `gptq`."""
    return gptq(array, 3, block, symmetric, inputs, scheme="int3-gptq")


def int2_gptq(
    array: NDArray[np.float32], block: int = 64, symmetric: bool = True, inputs: Inputs | None = None
) -> BlockwiseTensor:
    """2 bits with a scale per `block` inputs; see `gptq`."""
    return gptq(array, 2, block, symmetric, inputs, scheme="int2-gptq")


def gptq(
    array: NDArray[np.float32], bits: int, block: int, symmetric: bool, inputs: Inputs | None, scheme: str = ""
) -> BlockwiseTensor:
    """Quantize rows in blocks along K for the least error of products: float32 [N, K] -> BlockwiseTensor.

    Without `inputs`, or when they are all zero, this is rounding to nearest. Raises InputError for NaN, infinity, an
    impossible block, or inputs of another width.
    """
    check_matrix(array)
    n, k = array.shape
    if inputs is None or not inputs.second_moment.any():
        return quantize(array, bits, block, symmetric, scheme)
    if inputs.second_moment.shape != (k, k):
        raise InputError(f"calibration saw {len(inputs.second_moment)} inputs, the matrix has {k}")
    root = inverse_root(inputs.second_moment)
    out = Store(n, k, bits, fit_block(block, k), symmetric)
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        out.put(rows, *_round_rows(array[rows], root, out))
    return out.tensor(scheme)


def inverse_root(second_moment: NDArray[np.float64], damping: float = DAMPING) -> NDArray[np.float32]:
    """R, upper triangular with R^T R = the inverse of the damped second moment [K, K].

    H is factored from the end, H = U U^T with U upper triangular, so R = U^-1: the inverse is never computed.
    """
    import torch

    h = torch.from_numpy(second_moment).clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    try:
        upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise FieldError(
            "its inputs on the calibration text are not finite, or too large to square: give other text with {calib}, "
            "or another scheme for it"
        ) from None
    return torch.linalg.solve_triangular(upper, torch.eye(len(h), dtype=h.dtype), upper=True).float().numpy()


def _round_rows(
    array: NDArray[np.float32], root: NDArray[np.float32], out: Store
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Codes [rows, K padded], scales and zero points [rows, blocks] of some rows [rows, K]."""
    rows, k = array.shape
    x = np.zeros((out.n_blocks * out.block, rows), np.float32)  # the weights of an input are contiguous
    x[:k] = array.T
    codes = np.zeros_like(x)
    scales, zeros = np.empty((2, out.n_blocks, rows), np.float32)
    for b, first in enumerate(range(0, k, out.block)):
        last = min(first + out.block, k)
        scale, zero = search(np.ascontiguousarray(x[first : first + out.block].T), out.bits, out.symmetric)
        divisor = safe(scale)
        errors = np.empty((last - first, rows), np.float32)
        for j in range(first, last):
            codes[j] = round_codes(x[j], divisor, zero, out.bits)
            errors[j - first] = error = (x[j] - codes[j] * scale) / root[j, j]
            x[j + 1 : last] -= root[j, j + 1 : last, None] * error
        x[last:k] -= root[first:last, last:].T @ errors
        scales[b], zeros[b] = scale, zero
    return codes.T, scales.T, zeros.T
