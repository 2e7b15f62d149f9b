"""float32 in the checkpoint's layout: matrices that are not quantized, and vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quant.forms.form import MSFT, Candidates, Form, Graph, Value


@dataclass(frozen=True, eq=False)
class FloatTensor(Form):
    """An array in the checkpoint's layout, which is [K, N] for block layers."""

    array: NDArray[np.float32]
    scheme: str = field(default="float32", init=False)
    bits: int = field(default=32, init=False)
    transposed: bool = field(default=False, init=False)
    is_float: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.array.shape

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.shape[-1]

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"": self.array}

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        return self.array[index]

    def take(self, index: NDArray[np.integer]) -> FloatTensor:
        return FloatTensor(self.array[index])

    def dequantize(self) -> NDArray[np.float32]:
        return self.array

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        y = b.op("MatMul", x, self.value(b, weight_name), name=name)
        return y if bias is None else b.op("Add", y, bias, name=f"{name}.bias_add")

    def logits(self, b: Graph, name: str, x: Value) -> Value:
        # transB keeps the rows contiguous, so that Gather can read the same initializer.
        return b.op("FusedMatMul", x, self.value(b, f"{name}.weight"), name=name, domain=MSFT, transB=1)

    def gather(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        return b.op("Gather", self.value(b, weight_name), ids, name=name)

    def candidates(self, reader: Candidates, h: Value, candidates: Value) -> Value:
        return reader.from_floats(h, candidates)

    def graph_part(self, ending: str) -> NDArray[Any]:
        return self.array

    def value(self, b: Graph, name: str) -> Value:
        """The initializer in the graph's activation type."""
        return b.weight(name, self.array.astype(b.activations, copy=False))
