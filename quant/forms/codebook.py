"""4-bit indices into a table of 16 values (NF4, FP4).

Indices have the layout of bitsandbytes, which ONNX Runtime's MatMulBnb4 also reads: the matrix [N, K] is flattened
to N * K values and cut into blocks regardless of row boundaries.

    byte i:  index of value 2i in the upper four bits, of value 2i + 1 in the lower four
    value:   CODEBOOKS[scheme][index] * the scale of its block, which is the block's largest magnitude
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quant.forms.form import MSFT, Form, Graph, Value, expect, two
from training.errors import InputError

# NF4: quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, appendix E); 0 and both ends are exact.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4: one sign bit, two exponent bits, one mantissa bit, divided by the largest value 12; in order of bit patterns.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODEBOOKS: dict[str, NDArray[np.float32]] = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}
BNB4_TYPES = {"fp4": 0, "nf4": 1}  # attribute quant_type of MatMulBnb4
BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class CodebookTensor(Form):
    """A matrix of N output rows by K inputs in 4-bit codes with a scale per block."""

    packed: NDArray[np.uint8]  # [ceil(N * K / 2)]
    scales: NDArray[np.float32]  # [ceil(N * K / block)]
    scheme: str  # a name in CODEBOOKS
    block: int
    shape: tuple[int, int]
    transposed: bool = False
    bits: int = field(default=4, init=False)

    PARTS: ClassVar[tuple[str, ...]] = ("packed", "scales")
    NEEDED: ClassVar[tuple[str, ...]] = PARTS

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        if self.block not in BLOCKS:
            raise InputError(f"{self.scheme} has blocks of {', '.join(map(str, BLOCKS))}, not {self.block}")
        size = self.shape[0] * self.shape[1]
        expect("packed", self.packed, np.uint8, (-(-size // 2),))
        expect("scales", self.scales, np.float32, (-(-size // self.block),))

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"packed": self.packed, "scales": self.scales}

    @classmethod
    def assemble(cls, parts: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> CodebookTensor:
        shape, transposed = two(record["shape"]), record["transposed"]
        return cls(parts["packed"], parts["scales"], record["scheme"], record["block"], shape, transposed)

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        n, k = self.shape
        at = np.arange(n)[index][:, None] * k + np.arange(k)  # positions in the flattened matrix
        codes = self.packed[at >> 1] >> (4 * (1 - (at & 1))).astype(np.uint8) & np.uint8(15)
        values: NDArray[np.float32] = CODEBOOKS[self.scheme][codes] * self.scales[at // self.block]
        return values

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        inputs = (
            x,
            b.weight(f"{weight_name}.packed", self.packed),
            b.weight(f"{weight_name}.scales", self.scales.astype(b.activations, copy=False)),
        )
        y = b.op(
            "MatMulBnb4", *inputs, name=name, domain=MSFT, N=self.shape[0], K=self.shape[1],
            block_size=self.block, quant_type=BNB4_TYPES[self.scheme],
        )  # fmt: skip
        return y if bias is None else b.op("Add", y, bias, name=f"{name}.bias_add")
