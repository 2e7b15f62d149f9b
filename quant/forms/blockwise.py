"""n-bit codes with a scale, and optionally a zero point, per block of inputs.

The layout is that of ONNX Runtime's MatMulNBits (com.microsoft; inputs B, scales and
zero_points), so the export copies bytes and never quantizes again:

    row n:   [ block 0          | block 1          | ... ]        one scale per block, one zero point per block
    block:   [ c0 c1 c2 c3 ... ]  `bits` each, the lower bits of a byte hold the earlier code
    value:   (code - zero_point) * scale;  zero_point = 2**(bits-1) if none is stored

GatherBlockQuantized (bits, block_size, gather_axis=0, quantize_axis=2) reads the same bytes and looks up rows
[..., n_blocks, block]. It needs scales as [N, n_blocks, 1] and, only if zero points are stored, `offsets` as
[N, n_blocks, 1] (one byte per block for any bits); without them it also uses 2**(bits-1) for uint8 data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quant.forms.form import MSFT, Candidates, Form, Graph, Value, expect, two
from quant.forms.packing import fit_block, unpack
from training.errors import InputError

# Level 4 lets the kernel quantize activations to int8 by block: an error of 0.4-0.9 % of the largest output, and
# a hundred times faster than level 0 for 8-bit weights.
ACCURACY_LEVEL = 4


@dataclass(frozen=True, eq=False)
class BlockwiseTensor(Form):
    """A matrix of N output rows by K inputs, quantized along K in blocks."""

    packed: NDArray[np.uint8]  # [N, n_blocks, block * bits / 8]
    scales: NDArray[np.float32]  # [N, n_blocks]
    zero_points: NDArray[np.uint8] | None  # [N, ceil(n_blocks * bits / 8)], packed like codes; None: 2**(bits-1)
    bits: int
    block: int
    shape: tuple[int, int]
    scheme: str
    transposed: bool = False

    PARTS: ClassVar[tuple[str, ...]] = ("packed", "scales", "zero_points")
    NEEDED: ClassVar[tuple[str, ...]] = ("packed", "scales")

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        rows, width = self.shape
        if self.bits not in (2, 4, 8):
            raise InputError(f"{self.bits} bits cannot be packed: use 2, 4 or 8")
        if fit_block(self.block, width) != self.block:
            raise InputError(f"block {self.block} is wider than rows of {width} need")
        expect("packed", self.packed, np.uint8, (rows, self.n_blocks, self.block * self.bits // 8))
        expect("scales", self.scales, np.float32, (rows, self.n_blocks))
        if self.zero_points is not None:
            expect("zero_points", self.zero_points, np.uint8, (rows, -(-self.n_blocks * self.bits // 8)))

    @property
    def n_blocks(self) -> int:
        return -(-self.shape[1] // self.block)

    @cached_property
    def offsets(self) -> NDArray[np.uint8]:
        """The zero point of every block, unpacked or implied: uint8 [N, n_blocks]."""
        if self.zero_points is None:
            return np.full((self.shape[0], self.n_blocks), 2 ** (self.bits - 1), np.uint8)
        return unpack(self.zero_points, self.bits, self.n_blocks)

    # --- storage and values -------------------------------------------------------------------------

    def parts(self) -> dict[str, NDArray[Any]]:
        parts: dict[str, NDArray[Any]] = {"packed": self.packed, "scales": self.scales}
        return parts if self.zero_points is None else parts | {"zero_points": self.zero_points}

    @classmethod
    def assemble(cls, parts: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> BlockwiseTensor:
        return cls(
            parts["packed"], parts["scales"], parts.get("zero_points"), record["bits"], record["block"],
            two(record["shape"]), record["scheme"], record["transposed"],
        )  # fmt: skip

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        codes = unpack(self.packed[index], self.bits, self.block).astype(np.float32)
        codes -= self.offsets[index, :, None]
        codes *= self.scales[index, :, None]
        return codes.reshape(len(codes), -1)[:, : self.shape[1]]

    def take(self, index: NDArray[np.integer]) -> BlockwiseTensor:
        zeros = None if self.zero_points is None else self.zero_points[index]
        shape = (len(index), self.shape[1])
        return replace(self, packed=self.packed[index], scales=self.scales[index], zero_points=zeros, shape=shape)

    # --- graph --------------------------------------------------------------------------------------

    row_parts: ClassVar[tuple[str, str]] = ("packed", "scales")

    @property
    def row_middle(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def block_bytes(self) -> int:
        return self.packed.shape[2]

    @property
    def has_cuda_kernel(self) -> bool:  # type: ignore[override]
        return self.bits != 2

    @property
    def layout(self) -> object:
        return self.bits, self.block, self.zero_points is None

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        """MatMulNBits. In an If branch, scales and zero points belong to the branch (Builder.own_weight)."""
        zero_points = None
        if self.zero_points is not None:
            zero_points = b.own_weight(f"{weight_name}.zero_points", self.zero_points)
        inputs = (
            x,
            b.weight(f"{weight_name}.packed", self.packed),
            b.own_weight(f"{weight_name}.scales", self.scales.astype(b.activations, copy=False)),
            zero_points,
            None,
            bias,
        )
        return b.op(
            "MatMulNBits", *inputs, name=name, domain=MSFT, N=self.shape[0], K=self.shape[1],
            bits=self.bits, block_size=self.block, accuracy_level=ACCURACY_LEVEL,
        )  # fmt: skip

    def gather(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        rows = self.gather_blocks(b, name, weight_name, ids)
        # 0 copies a leading dimension of the ids [B, S]. Not -1: there may be no rows.
        return self._unpadded(
            b, b.op("Reshape", rows, b.ints(0, 0, self.n_blocks * self.block), name=f"{name}.flat"), name
        )

    def _unpadded(self, b: Graph, rows: Value, name: str) -> Value:
        """Whole blocks [B, S, blocks * block] -> [B, S, K]."""
        if self.n_blocks * self.block == self.shape[1]:
            return rows
        return b.op("Slice", rows, b.ints(0), b.ints(self.shape[1]), b.ints(2), name=f"{name}.unpad")

    def gather_many(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        """Gather and DequantizeLinear, with a block as a row: two thirds of the time of GatherBlockQuantized, which
        goes through the codes one by one. DequantizeLinear takes no 4-bit codes from bytes."""
        if self.bits != 8 or self.zero_points is not None or b.activations != np.float32:
            return self.gather(b, name, weight_name, ids)

        def blocks(part: str, array: NDArray[Any], *shape: int) -> Value:
            rows = b.op("Gather", b.weight(f"{weight_name}.{part}", array), ids, name=f"{name}.{part}", axis=0)
            return b.op("Reshape", rows, b.ints(*shape), name=f"{name}.{part}.by_block")

        codes, scales = blocks("packed", self.packed, -1, self.block), blocks("scales", self.scales, -1)
        zeros = b.filled(scales, np.array([2**7], np.uint8), f"{name}.zero_points")
        values = b.op("DequantizeLinear", codes, scales, zeros, name=name, axis=0)
        flat = b.op("Reshape", values, b.ints(1, -1, self.n_blocks * self.block), name=f"{name}.flat")
        return self._unpadded(b, flat, name)

    def gather_blocks(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        """Rows by block: ids [...] -> [..., blocks, block]."""
        zero_points = None
        if self.zero_points is not None:  # the operator needs one byte per block
            zero_points = b.weight(f"{weight_name}.zero_points.rows", self.offsets[..., None])
        scales = self.scales.astype(b.activations, copy=False)[..., None]
        inputs = (
            b.weight(f"{weight_name}.packed", self.packed),
            ids,
            b.weight(f"{weight_name}.scales.rows", scales),
            zero_points,
        )
        return b.op(
            "GatherBlockQuantized", *inputs, name=name, domain=MSFT, bits=self.bits, block_size=self.block,
            gather_axis=0, quantize_axis=2,
        )  # fmt: skip

    def candidates(self, reader: Candidates, h: Value, candidates: Value) -> Value:
        if self.zero_points is not None or self.bits not in (4, 8):
            return reader.from_dequantized(h, candidates)
        return reader.from_codes(h, candidates)

    def graph_part(self, ending: str) -> NDArray[Any]:
        if ending == "zero_points.rows":
            return self.offsets
        return self.parts()[ending.removesuffix(".rows").removesuffix(".branch")]
