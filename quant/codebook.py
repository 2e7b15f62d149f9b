"""A matrix of 4-bit indices into a table of 16 values (NF4, FP4), and one kept in half precision.

The layout of indices is that of bitsandbytes, which is also what ONNX Runtime's MatMulBnb4 reads: the matrix [N, K]
is one line of N * K values, cut into blocks whatever the rows are.

    byte i:  index of value 2i in the upper four bits, of value 2i + 1 in the lower four
    value:   CODEBOOKS[scheme][index] * the scale of its block, which is the block's largest magnitude
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError

# NF4: quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, appendix E), 0 and both ends exact.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4: a sign, two bits of exponent and one of mantissa, over the largest value 12; bit patterns in order.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODEBOOKS: dict[str, NDArray[np.float32]] = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}
BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class CodebookTensor:
    """A matrix of N output rows by K inputs in 4 bits and a scale per block; as quant.tensor.QuantizedTensor else."""

    packed: NDArray[np.uint8]  # [ceil(N * K / 2)]
    scales: NDArray[np.float32]  # [ceil(N * K / block)]
    scheme: str  # a name in CODEBOOKS
    block: int
    shape: tuple[int, int]  # (N, K)
    transposed: bool = False
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        if self.block not in BLOCKS:
            raise InputError(f"{self.scheme} has blocks of {', '.join(map(str, BLOCKS))}, not {self.block}")
        size = self.shape[0] * self.shape[1]
        expect("packed", self.packed, np.uint8, (-(-size // 2),))
        expect("scales", self.scales, np.float32, (-(-size // self.block),))

    @property
    def nbytes(self) -> int:
        """Bytes stored: indices and scales."""
        return self.packed.nbytes + self.scales.nbytes

    def parts(self) -> dict[str, NDArray[Any]]:
        """The stored arrays by the suffix they are filed under."""
        return {"packed": self.packed, "scales": self.scales}

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        """Dequantized output rows: float32 [len(index), K], whatever the checkpoint's layout."""
        n, k = self.shape
        at = np.arange(n)[index][:, None] * k + np.arange(k)  # places in the line of values
        codes = self.packed[at >> 1] >> (4 * (1 - (at & 1))).astype(np.uint8) & np.uint8(15)
        values: NDArray[np.float32] = CODEBOOKS[self.scheme][codes] * self.scales[at // self.block]
        return values

    def dequantize(self) -> NDArray[np.float32]:
        """The whole matrix in the checkpoint's layout: float32 [N, K], or [K, N] when transposed."""
        return in_layout(self.rows(slice(None)), self.transposed)


@dataclass(frozen=True, eq=False)
class HalfTensor:
    """A matrix of N output rows by K inputs in float16; as quant.tensor.QuantizedTensor else."""

    packed: NDArray[np.float16]  # [N, K]
    shape: tuple[int, int]  # (N, K)
    transposed: bool = False
    scheme: ClassVar[str] = "fp16"
    bits: ClassVar[int] = 16

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        expect("packed", self.packed, np.float16, self.shape)

    @property
    def block(self) -> int:
        """There are no blocks: the row's width."""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def parts(self) -> dict[str, NDArray[Any]]:
        """The stored array by the suffix it is filed under."""
        return {"packed": self.packed}

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        """Output rows: float32 [len(index), K], whatever the checkpoint's layout."""
        return self.packed[index].astype(np.float32)

    def dequantize(self) -> NDArray[np.float32]:
        """The whole matrix in the checkpoint's layout: float32 [N, K], or [K, N] when transposed."""
        return in_layout(self.rows(slice(None)), self.transposed)


def in_layout(values: NDArray[Any], transposed: bool) -> NDArray[Any]:
    """A matrix [N, K] as the checkpoint holds it."""
    return np.ascontiguousarray(values.T if transposed else values)


def expect(part: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Raise InputError unless a stored array has the type and the shape that its tensor needs."""
    if array.dtype != dtype or array.shape != shape:
        raise InputError(f"{part} is {array.dtype} {list(array.shape)} where {np.dtype(dtype)} {list(shape)} is needed")
