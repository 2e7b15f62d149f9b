"""A quantized matrix and the bit layout of its codes.

Blockwise tensors are laid out exactly as ONNX Runtime's MatMulNBits wants its inputs (com.microsoft, B,
scales and zero_points), so that exporting copies bytes and never quantizes again:

    row n:   [ block 0          | block 1          | ... ]        one scale per block, one zero point per block
    block:   [ c0 c1 c2 c3 ... ]  `bits` each, the lower bits of a byte hold the earlier code
    value:   (code - zero_point) * scale;  zero_point = 2**(bits-1) where none is stored

The same bytes serve GatherBlockQuantized (bits, block_size, gather_axis=0, quantize_axis=2), which looks up rows
[..., n_blocks, block]. It wants scales as [N, n_blocks, 1] and, only where zero points are stored, `offsets` as
[N, n_blocks, 1] (one byte per block for any bits); without them it takes 2**(bits-1) for uint8 data, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.codebook import CodebookTensor, HalfTensor, expect, in_layout
from training.errors import InputError

MIN_BLOCK, MAX_BLOCK = 16, 256  # what the kernels of ONNX Runtime take


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
    """The block to use for rows of `width`: as asked, or the smallest power of two from 16 that covers a narrow row.

    Raises InputError unless `block` is a power of two from 16 to 256.
    """
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise InputError(f"block {block} cannot be used: give a power of two from {MIN_BLOCK} to {MAX_BLOCK}")
    return min(block, max(MIN_BLOCK, 1 << (width - 1).bit_length()))


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix of N output rows by K inputs, quantized along K in blocks (or per row).

    `transposed` says that the checkpoint holds the matrix as [K, N] (GPT-2's block weights).
    """

    packed: NDArray[np.uint8] | NDArray[np.int8]  # uint8 [N, n_blocks, block * bits / 8]; int8 [N, K] when per_row
    scales: NDArray[np.float32]  # [N, n_blocks]; [N] when per_row
    zero_points: NDArray[np.uint8] | None  # [N, ceil(n_blocks * bits / 8)], packed like codes; None: 2**(bits-1)
    bits: int
    block: int  # codes that share a scale; K when per_row
    shape: tuple[int, int]  # (N, K)
    scheme: str  # its name in quant.schemes.SCHEMES
    transposed: bool = False

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        rows, width = self.shape
        if self.bits not in (2, 4, 8):
            raise InputError(f"{self.bits} bits cannot be packed: use 2, 4 or 8")
        if self.per_row:
            expect("packed", self.packed, np.int8, (rows, width))
            expect("scales", self.scales, np.float32, (rows,))
            return
        if fit_block(self.block, width) != self.block:
            raise InputError(f"block {self.block} is wider than rows of {width} need")
        expect("packed", self.packed, np.uint8, (rows, self.n_blocks, self.block * self.bits // 8))
        expect("scales", self.scales, np.float32, (rows, self.n_blocks))
        if self.zero_points is not None:
            expect("zero_points", self.zero_points, np.uint8, (rows, -(-self.n_blocks * self.bits // 8)))

    @property
    def per_row(self) -> bool:
        """One scale per output row and signed codes (int8-dynamic), instead of blocks."""
        return self.packed.dtype == np.int8

    @property
    def n_blocks(self) -> int:
        return 1 if self.per_row else -(-self.shape[1] // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and zero points."""
        return sum(part.nbytes for part in self.parts().values())

    @cached_property
    def offsets(self) -> NDArray[np.uint8]:
        """The zero point of every block, unpacked or implied: uint8 [N, n_blocks] (blockwise tensors)."""
        if self.zero_points is None:
            return np.full((self.shape[0], self.n_blocks), 2 ** (self.bits - 1), np.uint8)
        return unpack(self.zero_points, self.bits, self.n_blocks)

    def parts(self) -> dict[str, NDArray[Any]]:
        """The stored arrays by the suffix they are filed under."""
        parts: dict[str, NDArray[Any]] = {"packed": self.packed, "scales": self.scales}
        return parts if self.zero_points is None else parts | {"zero_points": self.zero_points}

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        """Dequantized output rows: float32 [len(index), K], whatever the checkpoint's layout."""
        if self.per_row:
            return self.packed[index].astype(np.float32) * self.scales[index, None]
        codes = unpack(self.packed[index].view(np.uint8), self.bits, self.block).astype(np.float32)
        codes -= self.offsets[index, :, None]
        codes *= self.scales[index, :, None]
        return codes.reshape(len(codes), -1)[:, : self.shape[1]]

    def dequantize(self) -> NDArray[np.float32]:
        """The whole matrix in the checkpoint's layout: float32 [N, K], or [K, N] when transposed."""
        return in_layout(self.rows(slice(None)), self.transposed)


Alone = QuantizedTensor | CodebookTensor | HalfTensor  # kept in fewer bits, and complete without another tensor


@dataclass(frozen=True, eq=False)
class DeltaTensor:
    """A vocabulary head [V, E] as its anchor's matrix plus a product of two thin ones, left [V, r] @ right [r, E].

    Heads of one leaf share `left`: what they learnt beyond their anchor lies in one space of r dimensions, and one
    row of it serves all of them. `anchor` is the matrix as it is stored, rounded or not, so errors do not add up.
    """

    anchor: NDArray[np.float32] | Alone  # [V, E]
    left: QuantizedTensor  # [V, r]
    right: QuantizedTensor  # [r, E]
    scheme: str  # its name in quant.schemes.low_rank.DELTAS
    anchor_name: str  # the anchor's tensor in the checkpoint
    sharers: tuple[str, ...]  # the heads with this `left`, in their order; the first one's file name is its own
    place: int  # of this head among them
    transposed = False

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        (rows, rank), (inner, width) = self.left.shape, self.right.shape
        if rank != inner or tuple(self.anchor.shape) != (rows, width):
            raise InputError(
                f"factors {[rows, rank]} and {[inner, width]} do not make a delta to {list(self.anchor.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def bits(self) -> int:
        """Of a code of `left`."""
        return self.left.bits

    @property
    def block(self) -> int:
        return self.left.block

    @property
    def nbytes(self) -> int:
        """Bytes stored for this head: `right` and an equal share of `left`; the sum over heads is what is on disk."""
        share, rest = divmod(self.left.nbytes, len(self.sharers))
        return self.right.nbytes + share + (self.place < rest)

    @cached_property
    def _right(self) -> NDArray[np.float32]:
        return self.right.dequantize()

    def parts(self) -> dict[str, NDArray[Any]]:
        """The stored arrays by the suffix they are filed under; `left` belongs to the first of its heads."""
        factors = {"right": self.right} if self.place else {"left": self.left, "right": self.right}
        return {f"{side}.{part}": a for side, factor in factors.items() for part, a in factor.parts().items()}

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        """Dequantized rows: float32 [len(index), E]."""
        anchor = self.anchor[index] if isinstance(self.anchor, np.ndarray) else self.anchor.rows(index)
        return anchor + self.left.rows(index) @ self._right

    def dequantize(self) -> NDArray[np.float32]:
        """The whole head: float32 [V, E]."""
        return self.rows(slice(None))


Stored = Alone | DeltaTensor  # every way to keep a matrix in fewer bits
Weight = NDArray[np.float32] | Stored  # one tensor of a checkpoint, float or quantized
