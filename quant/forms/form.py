"""The interface of every storage form, used by the quantized folder, the torch reference and the graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError

MSFT = "com.microsoft"  # ONNX Runtime's own operators
Value = Any  # a value of the graph (onnx_ir.Value), which this package does not import


class Graph(Protocol):
    """The part of dmpt_export.graph.builder.Builder that forms use."""

    @property
    def activations(self) -> np.dtype[Any]:
        """float32 or float16: the type of hidden rows."""
        ...

    def op(
        self, op_type: str, *inputs: Value | None, name: str, domain: str = "", **attributes: Any
    ) -> Value: ...  # appends a node with one output

    def filled(self, like: Value, array: NDArray[Any], name: str) -> Value: ...  # one value in the shape of `like`

    def weight(self, name: str, array: NDArray[Any]) -> Value: ...  # an initializer of the main graph, shared by name

    def own_weight(self, name: str, array: NDArray[Any]) -> Value: ...  # one that belongs to the current branch

    def cast(self, value: Value, name: str) -> Value: ...  # float16 -> the type of hidden rows

    def ints(self, *values: int) -> Value: ...  # a constant int64 vector


class Candidates(Protocol):
    """The ways in which dmpt_export.graph.rescore reads head rows of candidates; each returns their logits."""

    def from_floats(self, h: Value, candidates: Value) -> Value: ...

    def from_codes(self, h: Value, candidates: Value) -> Value: ...

    def from_dequantized(self, h: Value, candidates: Value) -> Value: ...


class Form(ABC):
    """A matrix of N output rows by K inputs as it is stored.

    `transposed`: the checkpoint holds the matrix as [K, N] (GPT-2's block weights). All tensor names are the
    checkpoint's.
    """

    scheme: str  # its name in quant.schemes.SCHEMES
    bits: int  # of a code
    block: int  # codes that share a scale; K without blocks
    shape: tuple[int, ...]  # (N, K)
    transposed: bool
    PARTS: ClassVar[tuple[str, ...]] = ()  # suffixes that parts() may have
    NEEDED: ClassVar[tuple[str, ...]] = ()  # suffixes that it always has
    has_cuda_kernel: ClassVar[bool] = True
    adds_to_anchor: ClassVar[bool] = False  # whether logits() and candidates() return a difference to the anchor's
    rounds_activations: ClassVar[bool] = False  # whether product() rounds x with one scale for all rows of a run
    is_float: ClassVar[bool] = False  # not quantized: stored under the tensor's own name, without a record

    # --- storage ------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self) -> dict[str, NDArray[Any]]:
        """The stored arrays by name suffix."""

    @classmethod
    def assemble(cls, parts: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Form:
        """The inverse of parts() and record(). Raises InputError for parts that are missing or do not fit together."""
        raise NotImplementedError(f"{cls.__name__} cannot be assembled from its own parts alone")

    def record(self) -> dict[str, Any]:
        """The tensor's record for config.json."""
        return {
            "scheme": self.scheme,
            "bits": self.bits,
            "block": self.block,
            "shape": list(self.shape),
            "transposed": self.transposed,
        }

    def renamed(self, names: Mapping[str, str]) -> Form:
        """The same in a checkpoint whose tensors have other names: old -> new, without those that are left out."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def whole_bytes(self) -> int:
        """The part of `nbytes` that is read at every step, however few rows are looked up."""
        return 0

    def as_transposed(self, transposed: bool) -> Self:
        """The same matrix with `transposed` set."""
        return replace(self, transposed=transposed)  # type: ignore[type-var]  # every form is a dataclass

    # --- values -------------------------------------------------------------------------------------

    @abstractmethod
    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        """Dequantized output rows: float32 [len(index), K], whatever the checkpoint's layout."""

    def take(self, index: NDArray[np.integer]) -> Form:
        """Some output rows, stored as they are. Only forms whose rows can be looked up have it."""
        raise TypeError(f"rows of {self.scheme} are not stored apart")

    def dequantize(self) -> NDArray[np.float32]:
        """The whole matrix in the checkpoint's layout: float32 [N, K], or [K, N] when transposed."""
        return in_layout(self.rows(slice(None)), self.transposed)

    # --- graph --------------------------------------------------------------------------------------

    @property
    def layout(self) -> object:
        """Key of the storage layout: heads with equal keys can be stored side by side and read together."""
        return type(self)

    @abstractmethod
    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        """x W^T + bias for hidden rows: [..., K] -> [..., N]. `name` names the node."""

    def logits(self, b: Graph, name: str, x: Value) -> Value:
        """Logits over the whole vocabulary for a matrix [V, E]: [..., E] -> [..., V]."""
        return self.product(b, name, f"{name}.weight", x)

    def gather(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        """Rows of a matrix [V, E]: ids [B, S] -> [B, S, E]. Ids must be valid: the kernels do not check."""
        raise TypeError(f"{weight_name} is stored as {self.scheme}, whose rows cannot be looked up")

    def gather_many(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        """gather() for hundreds of rows: ids [1, m] -> [1, m, E]. The same values, by more nodes where faster."""
        return self.gather(b, name, weight_name, ids)

    def candidates(self, reader: Candidates, h: Value, candidates: Value) -> Value:
        """Logits of this head and those stored beside it on candidates, flat, by one method of `reader`."""
        raise TypeError(f"heads stored as {self.scheme} cannot be read row by row")

    def graph_part(self, ending: str) -> NDArray[Any]:
        """Expected content of the initializer named by the tensor and `.ending`: one of parts(), or derived."""
        return self.parts()[ending]


def in_layout(values: NDArray[Any], transposed: bool) -> NDArray[Any]:
    """A matrix [N, K] in the checkpoint's layout."""
    return np.ascontiguousarray(values.T if transposed else values)


def expect(part: str, array: NDArray[Any], dtype: type[np.generic], shape: Sequence[int]) -> None:
    """Raise InputError unless a stored array has the expected dtype and shape."""
    if array.dtype != dtype or array.shape != tuple(shape):
        raise InputError(f"{part} is {array.dtype} {list(array.shape)} where {np.dtype(dtype)} {list(shape)} is needed")


def two(shape: Sequence[int]) -> tuple[int, int]:
    """A recorded shape as a pair."""
    return shape[0], shape[1]
