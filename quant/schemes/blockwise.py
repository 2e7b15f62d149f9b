"""Round-to-nearest int8, int4, int3 and int2 with one scale per block of inputs.

The scale of a block is found by search: a few trial scales around "the largest value just fits", each refined to
the least-squares scale for its codes; the trial with the smallest squared error wins. With codes c (zero point
subtracted) and values x, the best scale is <x,c>/<c,c> and its squared error ||x||^2 - <x,c>^2/<c,c>, so a trial
costs one rounding and two dot products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.packing import fit_block, pack
from training.errors import InputError

CHUNK = 1 << 17  # values processed at a time, so that temporaries fit the processor's cache
Found = tuple[NDArray[np.float32], NDArray[np.float32]]  # scale and zero point of each block
Find = Callable[[NDArray[np.float32]], Found]  # blocks [B, block] -> scale and zero point [B]
TINY = np.finfo(np.float32).tiny  # smaller numbers lose bits

# Trial ranges relative to "the largest value just fits". Symmetric codes reach one step further down than up
# (-8..7), so the largest value goes to the long side; above 1 both signs fit on the short side.
RATIOS: dict[int, tuple[float, ...]] = {
    8: (1.0,),  # clipping never helps: the rounding error is far below any clipped value
    4: (0.70, 0.78, 0.85, 0.90, 0.95, 1.0, 1.05, 1.10, 1.15),
    3: (0.55, 0.63, 0.70, 0.78, 0.85, 0.92, 1.0, 1.10, 1.20, 1.30),
    2: (0.40, 0.50, 0.60, 0.70, 0.80, 0.90, 1.0, 1.15, 1.30, 1.50, 1.70, 2.0),
}
FIELD = {3: 4}  # stored bits of a code where they differ from its own: no kernel reads packed 3-bit codes


def int8(array: NDArray[np.float32], block: int = 128, symmetric: bool = True) -> BlockwiseTensor:
    """8 bits with a scale per `block` inputs; see `quantize`."""
    return quantize(array, 8, block, symmetric, scheme="int8")


def int4(array: NDArray[np.float32], block: int = 32, symmetric: bool = True) -> BlockwiseTensor:
    """4 bits with a scale per `block` inputs; see `quantize`."""
    return quantize(array, 4, block, symmetric, scheme="int4")


def int3(array: NDArray[np.float32], block: int = 32, symmetric: bool = True) -> BlockwiseTensor:
    """3 bits in the 4-bit fields that kernels read, with a scale per `block` inputs; see `quantize`."""
    return quantize(array, 3, block, symmetric, scheme="int3")


def int2(array: NDArray[np.float32], block: int = 64, symmetric: bool = True) -> BlockwiseTensor:
    """2 bits with a scale per `block` inputs; see `quantize`."""
    return quantize(array, 2, block, symmetric, scheme="int2")


def quantize(
    array: NDArray[np.float32],
    bits: int,
    block: int,
    symmetric: bool = True,
    scheme: str = "",
    find: Find | None = None,
) -> BlockwiseTensor:
    """Quantize rows in blocks along K, the last one padded with zeros: float32 [N, K] -> BlockwiseTensor.

    `block` is a power of two from 16 to 256 and shrinks to cover a narrow row. Asymmetric tensors store an
    integer zero point per block. `find` replaces the search for scales and zero points. Raises InputError for NaN,
    infinity or an impossible block.
    """
    check_matrix(array)
    n, k = array.shape
    block = fit_block(block, k)
    n_blocks = -(-k // block)
    find = find or partial(search, bits=bits, symmetric=symmetric)
    out = Store(n, k, bits, block, symmetric)
    step = max(1, CHUNK // (n_blocks * block))
    padded = np.zeros((min(step, n), n_blocks * block), np.float32)
    for start in range(0, n, step):
        stop = min(start + step, n)
        padded[: stop - start, :k] = array[start:stop]
        x = padded[: stop - start].reshape(-1, block)
        scale, zero = find(x)
        out.put(slice(start, stop), round_codes(x, safe(scale)[:, None], zero[:, None], bits), scale, zero)
    return out.tensor(scheme)


class Store:
    """Collects codes, scales and zero points of rows into a BlockwiseTensor."""

    def __init__(self, n: int, k: int, bits: int, block: int, symmetric: bool) -> None:
        self.shape, self.bits, self.block, self.symmetric = (n, k), bits, block, symmetric
        self.field = FIELD.get(bits, bits)
        self.n_blocks = -(-k // block)
        self.packed = np.empty((n, self.n_blocks, block * self.field // 8), np.uint8)
        self.scales = np.empty((n, self.n_blocks), np.float32)
        self.zeros = np.empty((n, self.n_blocks), np.uint8)

    def put(
        self, rows: slice, codes: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32]
    ) -> None:
        """codes: zero point subtracted, any shape of [rows, n_blocks, block]; scale and zero: one per block."""
        # Without a stored zero point, the middle of the field is implied.
        zero = np.full_like(zero, 2 ** (self.field - 1)) if self.symmetric else zero
        shape = (-1, self.n_blocks, self.block)
        fields = (codes.reshape(shape) + zero.reshape(*shape[:2], 1)).astype(np.uint8)
        self.packed[rows] = pack(fields, self.field)
        self.scales[rows] = scale.reshape(shape[:2])
        self.zeros[rows] = zero.reshape(shape[:2])

    def tensor(self, scheme: str) -> BlockwiseTensor:
        zeros = None if self.symmetric else pack(self.zeros, self.field)
        return BlockwiseTensor(self.packed, self.scales, zeros, self.field, self.block, self.shape, scheme)


def check_matrix(array: NDArray[Any]) -> None:
    """Raise InputError unless `array` is a finite, non-empty matrix."""
    if array.ndim != 2 or not array.size:
        raise InputError(f"only a matrix can be quantized, not an array of shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InputError("the matrix holds NaN or infinity")


def search(x: NDArray[np.float32], bits: int, symmetric: bool) -> Found:
    """Scale and zero point of each block, for the least squared error: (B, block) -> (B,), (B,)."""
    return _symmetric(x, bits) if symmetric else _asymmetric(x, bits)


def _symmetric(x: NDArray[np.float32], bits: int) -> Found:
    """Scale and the fixed zero point of each block: (B, block) -> (B,), (B,). Scales may be negative."""
    half = np.float32(2 ** (bits - 1))
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    zero = np.full(len(x), half, np.float32)
    trials = [(extreme * np.float32(-ratio) / half, zero) for ratio in RATIOS[bits]]
    return _best(x, trials, bits)


def _asymmetric(x: NDArray[np.float32], bits: int) -> Found:
    """Scale and an integer zero point of each block: (B, block) -> (B,), (B,). The range always holds 0."""
    top = np.float32(2**bits - 1)
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    zero = np.rint(-low / safe((high - low) / top)).clip(0, top)
    trials = [((high - low) * np.float32(ratio) / top, zero) for ratio in RATIOS[bits]]
    return _best(x, trials, bits)


def _best(x: NDArray[np.float32], trials: list[Found], bits: int) -> Found:
    """The trial with the least squared error, its scale refined by least squares."""
    gain = np.full(len(x), -1, np.float32)
    scale, zero = np.ones(len(x), np.float32), trials[0][1].copy()
    for trial, trial_zero in trials:
        c = round_codes(x, safe(trial)[:, None], trial_zero[:, None], bits)
        xc, cc = np.einsum("bk,bk->b", x, c), np.einsum("bk,bk->b", c, c)
        refined = xc / np.maximum(cc, 1)
        better = xc * refined > gain
        gain = np.where(better, xc * refined, gain)
        scale = np.where(better, refined, scale)
        zero = np.where(better, trial_zero, zero)
    # An all-zero block gets scale 0, not 1: kernels subtract zero_point * scale * sum(x) from the sum of the codes,
    # and with a scale far above its neighbours' that difference would have a visible rounding error.
    return np.where(np.abs(scale) < TINY, np.float32(0), scale), zero


def safe(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale as a divisor: 1 where it is too small to divide by, so that codes fall on the zero point."""
    return np.where(np.abs(scale) < TINY, np.float32(1), scale)


def round_codes(
    x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """Codes with the zero point subtracted, as floats in the shape of x; scales must be safe() to divide by."""
    c = x / scale
    np.rint(c, out=c)
    return np.clip(c, -zero, np.float32(2**bits - 1) - zero, out=c)
