"""float16: half the size on disk; on a CPU the runtime multiplies in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quant.forms.form import MSFT, Candidates, Form, Graph, Value, expect, in_layout, two


@dataclass(frozen=True, eq=False)
class HalfTensor(Form):
    """A matrix of N output rows by K inputs in float16."""

    packed: NDArray[np.float16]  # [N, K]
    shape: tuple[int, int]
    transposed: bool = False
    scheme: str = field(default="fp16", init=False)
    bits: int = field(default=16, init=False)

    PARTS: ClassVar[tuple[str, ...]] = ("packed",)
    NEEDED: ClassVar[tuple[str, ...]] = PARTS

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        expect("packed", self.packed, np.float16, self.shape)

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.shape[1]

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"packed": self.packed}

    @classmethod
    def assemble(cls, parts: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> HalfTensor:
        return cls(parts["packed"], two(record["shape"]), record["transposed"])

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        return self.packed[index].astype(np.float32)

    def take(self, index: NDArray[np.integer]) -> HalfTensor:
        return replace(self, packed=self.packed[index], shape=(len(index), self.shape[1]))

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        y = b.op("MatMul", x, self._matrix(b, weight_name), name=name)
        return y if bias is None else b.op("Add", y, bias, name=f"{name}.bias_add")

    def logits(self, b: Graph, name: str, x: Value) -> Value:
        # transB keeps the rows contiguous, so that Gather can read the same initializer.
        return b.op("FusedMatMul", x, self._matrix(b, f"{name}.weight"), name=name, domain=MSFT, transB=1)

    def gather(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        rows = b.op("Gather", b.weight(weight_name, self.packed), ids, name=f"{name}.half")
        return b.cast(rows, name)

    def candidates(self, reader: Candidates, h: Value, candidates: Value) -> Value:
        return reader.from_floats(h, candidates)

    def graph_part(self, ending: str) -> NDArray[Any]:
        return in_layout(self.packed, self.transposed)

    def _matrix(self, b: Graph, weight_name: str) -> Value:
        """The whole matrix; ONNX Runtime casts it once, when it loads the model."""
        return b.cast(b.weight(weight_name, in_layout(self.packed, self.transposed)), weight_name)
