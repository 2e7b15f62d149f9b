"""A head stored as its anchor plus a product of two thin matrices.

The graph computes only what the head adds to its anchor's logits: h times the small right factor, then times the left
factor, either in full or only on the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.form import Form, Graph, Value
from training.errors import InputError

LEFT, RIGHT = "left", "right"  # factors


@dataclass(frozen=True, eq=False)
class DeltaTensor(Form):
    """A vocabulary head [V, E] as its anchor's matrix plus a product of two thin ones, left [V, r] @ right [r, E].

    The heads of a leaf share `left`: their differences from the anchor lie in one space of r dimensions, and one row of
    it serves all of them. `anchor` is the matrix as stored, rounded or not, so errors do not add up.
    """

    anchor: Form  # [V, E], not a delta itself
    left: BlockwiseTensor  # [V, r]
    right: BlockwiseTensor  # [r, E]
    scheme: str  # its name in quant.schemes.low_rank.DELTAS
    anchor_name: str  # the anchor's tensor in the checkpoint
    sharers: tuple[str, ...]  # the heads with this `left`, in order; it is stored under the first one's name
    place: int  # index of this head in `sharers`
    transposed: bool = field(default=False, init=False)
    adds_to_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise InputError when the parts do not fit together (a damaged or foreign file)."""
        (rows, rank), (inner, width) = self.left.shape, self.right.shape
        if rank != inner or tuple(self.anchor.shape) != (rows, width):
            raise InputError(
                f"factors {[rows, rank]} and {[inner, width]} do not make a delta to {list(self.anchor.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.left.shape[0], self.right.shape[1]

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of a code of `left`."""
        return self.left.bits

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.left.block

    @property
    def nbytes(self) -> int:
        """Bytes stored for this head: `right` and an equal share of `left`; the sum over heads is the size on disk."""
        share, rest = divmod(self.left.nbytes, len(self.sharers))
        return self.right.nbytes + share + (self.place < rest)

    @cached_property
    def _right(self) -> NDArray[np.float32]:
        return self.right.dequantize()

    def parts(self) -> dict[str, NDArray[Any]]:
        """The stored arrays by name suffix; `left` belongs to the first of its heads."""
        factors = {"right": self.right} if self.place else {"left": self.left, "right": self.right}
        return {f"{side}.{part}": a for side, factor in factors.items() for part, a in factor.parts().items()}

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        """Dequantized rows: float32 [len(index), E]."""
        return self.anchor.rows(index) + self.left.rows(index) @ self._right

    def record(self) -> dict[str, Any]:
        return super().record() | {"anchor": self.anchor_name, "sharers": list(self.sharers)}

    def renamed(self, names: Mapping[str, str]) -> DeltaTensor:
        own = self.sharers[self.place]
        sharers = tuple(names[name] for name in self.sharers if name in names)
        return replace(self, anchor_name=names[self.anchor_name], sharers=sharers, place=sharers.index(names[own]))

    @property
    def whole_bytes(self) -> int:
        """`right`: of `left` only the candidates' rows are read."""
        return self.right.nbytes

    # --- graph --------------------------------------------------------------------------------------

    @property
    def layout(self) -> object:
        return self.sharers

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        """What the head adds to its anchor's logits: [1, n, E] -> [1, n, V]."""
        small = self.right.product(b, f"{name}.{RIGHT}", f"{weight_name}.{RIGHT}", x)
        return self.left.product(b, f"{name}.{LEFT}", self.left_name, small)

    @property
    def left_name(self) -> str:
        """The initializer that all heads with this factor share."""
        numbers = "_".join(name.split(".")[1] for name in self.sharers)
        return f"heads.{numbers}.weight.{LEFT}"

    def graph_part(self, ending: str) -> NDArray[Any]:
        side, _, part = ending.partition(".")
        return (self.left if side == LEFT else self.right).graph_part(part)
