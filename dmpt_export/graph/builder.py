"""A thin layer over onnx_ir: append a node, refer to a weight, open an If.

Every weight is an initializer of the MAIN graph, even if only a branch uses it: subgraphs see it through the outer
scope, so it is stored and prepacked once, and external-data and quantization tools find it.

The exceptions are scales and zero points of n-bit products in a branch (`own_weight`): they belong to that branch.
Kernels may read them while packing the weights, and then only see initializers of the same graph. Otherwise ONNX
Runtime before 1.29 reads a null pointer on Arm processors with dot-product instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from runtime.graph_io import TensorSpec

MSFT = "com.microsoft"
OWN = ".branch"  # suffix of a branch's own initializers


@dataclass(frozen=True)
class Spec:
    """Name, type and shape of a graph or branch output."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> Spec:
        return cls(spec.name, ir.DataType.from_numpy(np.dtype(spec.dtype)), spec.shape)

    def value(self, name: str | None = None) -> ir.Value:
        return ir.val(name or self.name, self.dtype, list(self.shape))


class Builder:
    """Collects the nodes of one graph; `branch` opens a builder for a subgraph that shares the initializers."""

    def __init__(self, dtype: ir.DataType = ir.DataType.FLOAT, parent: Builder | None = None) -> None:
        self.dtype = dtype  # of activations
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = parent.initializers if parent else {}  # of the main graph
        self.own: dict[str, ir.Value] = {} if parent else self.initializers  # of the current graph
        self._names: dict[str, int] = parent._names if parent else {}

    # --- nodes ----------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output and return that output, named after the node."""
        return self.ops(op_type, *inputs, name=name, outputs=1, unused=(), domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        outputs: int,
        unused: tuple[int, ...] = (),
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs; the `unused` ones get no name, so the kernel skips them."""
        name = self._unique(name)
        values = [ir.val("" if i in unused else name if i == 0 else f"{name}:{i}") for i in range(outputs)]
        self.nodes.append(ir.node(op_type, list(inputs), attributes or None, domain=domain, outputs=values, name=name))
        return values

    def _unique(self, name: str) -> str:
        """Node names mirror tensor names; a second node with the same name gets a number."""
        seen = self._names.get(name, 0)
        self._names[name] = seen + 1
        return name if seen == 0 else f"{name}#{seen}"

    @property
    def activations(self) -> np.dtype[Any]:
        """`dtype` as a numpy dtype."""
        return self.dtype.numpy()

    def cast(self, value: ir.Value, name: str) -> ir.Value:
        """Cast float16 to the graph's activation type."""
        if self.dtype == ir.DataType.FLOAT16:
            return value
        return self.op("Cast", value, name=f"{name}.cast", to=int(self.dtype))

    def filled(self, like: ir.Value, array: np.ndarray, name: str) -> ir.Value:
        """One value, array [1], in the shape of another tensor."""
        shape = self.op("Shape", like, name=f"{name}.shape")
        return self.op("ConstantOfShape", shape, name=name, value=ir.tensor(array))

    # --- weights and constants --------------------------------------------------------------------

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """The main-graph initializer `name`; the first call adds it, later ones share it."""
        return _initializer(self.initializers, name, array)

    def own_weight(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer of the current graph; in a branch its name is `name` + OWN, because the main graph may have
        one with that name. Each branch that uses the array stores it."""
        return _initializer(self.own, name if self.own is self.initializers else f"{name}{OWN}", array)

    def lazy_weight(
        self, name: str, dtype: np.dtype[Any], shape: Sequence[int], make: Callable[[], np.ndarray]
    ) -> ir.Value:
        """weight() for an array that is only built when it is written, then dropped."""
        if name not in self.initializers:
            kind, size = ir.DataType.from_numpy(dtype), ir.Shape(shape)
            tensor = ir.LazyTensor(lambda: ir.Tensor(make(), name=name), dtype=kind, shape=size, name=name)
            self.initializers[name] = ir.val(name, kind, size, const_value=tensor)
        return self.initializers[name]

    def ints(self, *values: int, scalar: bool = False) -> ir.Value:
        """A constant int64 vector, or with `scalar` a single number; equal constants are shared."""
        label = "_".join(str(v) for v in values) or "none"
        array = np.array(values[0] if scalar else values, dtype=np.int64)
        return self.weight(f"const.{'scalar' if scalar else 'ints'}.{label}", array)

    def nothing(self, spec: Spec) -> ir.Value:
        """A result of a branch without rows: 0 for each size that is not fixed."""
        shape = (0 if isinstance(size, str) else size for size in spec.shape)
        zero = ir.tensor(np.zeros(1, spec.dtype.numpy()))
        return self.op("ConstantOfShape", self.ints(*shape), name=f"{spec.name}.skipped", value=zero)

    # --- branches ---------------------------------------------------------------------------------

    def branch(
        self,
        condition: ir.Value,
        then: Callable[[Builder], Sequence[ir.Value]],
        otherwise: Callable[[Builder], Sequence[ir.Value]],
        outputs: Sequence[Spec],
        name: str,
    ) -> list[ir.Value]:
        """An If whose branches both yield `outputs`, with their types and shapes written out."""
        graphs = {}
        for label, fill in (("then", then), ("else", otherwise)):
            inner = Builder(self.dtype, parent=self)
            results = list(fill(inner))
            for value, spec in zip(results, outputs, strict=True):
                value.dtype, value.shape = spec.dtype, ir.Shape(spec.shape)
            own = list(inner.own.values())
            graphs[f"{label}_branch"] = ir.Graph(
                [], results, nodes=inner.nodes, initializers=own, name=f"{name}.{label}"
            )
        values = [spec.value() for spec in outputs]
        attributes = [ir.AttrGraph(key, graph) for key, graph in graphs.items()]
        self.nodes.append(ir.Node("", "If", [condition], attributes, outputs=values, name=self._unique(name)))
        return values


def _initializer(held: dict[str, ir.Value], name: str, array: np.ndarray) -> ir.Value:
    if name not in held:
        tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
        held[name] = ir.val(name, tensor.dtype, tensor.shape, const_value=tensor)
    return held[name]
