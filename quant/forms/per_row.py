"""Signed codes with one scale per output row, for products that also round activations (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quant.forms.form import MSFT, Form, Graph, Value, expect, two


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

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        inputs = (
            x,
            b.weight(f"{weight_name}.int8", self.packed.T),
            b.weight(f"{weight_name}.scales", self.scales),
            None,
            bias,
        )
        return b.op("DynamicQuantizeMatMul", *inputs, name=name, domain=MSFT)

    def graph_part(self, ending: str) -> NDArray[Any]:
        return self.packed.T if ending == "int8" else self.scales
