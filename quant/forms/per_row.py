"""Signed codes with one scale per output row, for products that also round activations (W8A8).

Layers are stored as DynamicQuantizeMatMul reads them, [K, N]; vocabulary matrices by row, [V, E], so that one array
serves the embedding, the logits and the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from quant.forms.form import MSFT, Candidates, Form, Graph, Value, expect, two

FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True, eq=False)
class PerRowTensor(Form):
    """A matrix of N output rows by K inputs in int8."""

    packed: NDArray[np.int8]  # [N, K]
    scales: NDArray[np.float32]  # [N]
    shape: tuple[int, int]
    scheme: str
    transposed: bool = False
    bits: int = field(default=8, init=False)
    has_cuda_kernel: ClassVar[bool] = False
    rounds_activations: ClassVar[bool] = True

    PARTS: ClassVar[tuple[str, ...]] = ("packed", "scales")
    NEEDED: ClassVar[tuple[str, ...]] = PARTS

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        expect("packed", self.packed, np.int8, self.shape)
        expect("scales", self.scales, np.float32, self.shape[:1])

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.shape[1]

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"packed": self.packed, "scales": self.scales}

    @classmethod
    def assemble(cls, parts: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> PerRowTensor:
        return cls(parts["packed"], parts["scales"], two(record["shape"]), record["scheme"], record["transposed"])

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        return self.packed[index].astype(np.float32) * self.scales[index, None]

    def take(self, index: NDArray[np.integer]) -> Self:
        return replace(self, packed=self.packed[index], scales=self.scales[index], shape=(len(index), self.shape[1]))

    # --- graph --------------------------------------------------------------------------------------

    n_blocks: ClassVar[int] = 1
    row_parts: ClassVar[tuple[str, str]] = ("int8.rows", "scales.rows")
    row_middle: ClassVar[int] = 0

    @property
    def block_bytes(self) -> int:
        return self.shape[1]

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        return self._times(b, name, weight_name, x, b.weight(f"{weight_name}.int8", self.packed.T), bias)

    def logits(self, b: Graph, name: str, x: Value) -> Value:
        # The kernel needs [E, V]. ONNX Runtime transposes once, when it loads the model; rows are looked up as stored.
        matrix = b.op("Transpose", self._rows(b, f"{name}.weight"), name=f"{name}.transposed", perm=[1, 0])
        return self._times(b, name, f"{name}.weight", x, matrix, None)

    def gather(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        codes = b.op("Gather", self._rows(b, weight_name), ids, name=f"{name}.codes", axis=0)
        scales = b.op("Gather", b.weight(f"{weight_name}.scales", self.scales), ids, name=f"{name}.scales", axis=0)
        values = b.op("Cast", codes, name=f"{name}.values", to=FLOAT)
        return b.op("Mul", values, b.op("Unsqueeze", scales, b.ints(-1), name=f"{name}.by_row"), name=name)

    def candidates(self, reader: Candidates, h: Value, candidates: Value) -> Value:
        return reader.from_codes(h, candidates)

    def _times(self, b: Graph, name: str, weight_name: str, x: Value, matrix: Value, bias: Value | None) -> Value:
        inputs = (x, matrix, b.weight(f"{weight_name}.scales", self.scales), None, bias)
        return b.op("DynamicQuantizeMatMul", *inputs, name=name, domain=MSFT)

    def _rows(self, b: Graph, weight_name: str) -> Value:
        return b.weight(f"{weight_name}.int8.rows", self.packed)

    def graph_part(self, ending: str) -> NDArray[Any]:
        match ending:
            case "int8":
                return self.packed.T
            case "int8.rows":
                return self.packed
            case "scales.rows":
                return self.scales[:, None]
        return self.parts()[ending]
