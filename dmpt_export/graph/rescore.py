"""Logits of a leaf's other heads on the anchor's candidates: gather the head rows, multiply them by h.

Memory reads dominate the cost, so as little as possible is gathered:

- Consecutive heads that only this leaf uses, and only for candidates, are stored interleaved, [V, heads, ...]:
  one gather fetches a candidate's rows of all of them.
- Quantized rows stay integers: a gather of bytes and one MatMulInteger, a third of the time of dequantizing
  them. h is split into its rounded value and the rest, 14 bits together: finer than the kernels of full heads.
  Because of the scale per block, h becomes a matrix with a column for each block, zero outside it:

      codes [K, E] . [E, blocks] -> sums by block [K, blocks], times scales [K, blocks], summed -> logits [K]

- Two 4-bit codes share a byte, low + 16 high, for inputs x and y. As (low + 16 high) y / 16 = low y / 16 +
  high y, the whole bytes times y / 16 and the low codes times x - y / 16 make x low + y high: no shift.

For heads that are deltas to their anchor, or projections in front of it, dmpt_export.graph.deltas and projected compute
only what they add to the anchor's logits.
Rows with zero points, and fp16 graphs (no MatMulInteger on a GPU for these types), are dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.builder import MSFT, Builder
from dmpt_export.graph.deltas import candidate_logits as delta_logits
from dmpt_export.graph.projected import candidate_logits as projected_logits
from quant.forms.blockwise import BlockwiseTensor
from quant.forms.delta import DeltaTensor
from quant.forms.form import Form
from quant.forms.per_row import PerRowTensor
from quant.forms.weights import Weights, form_of
from training.model.config import DMPTConfig
from training.model.shape import PROJECTED

Coded = BlockwiseTensor | PerRowTensor  # heads whose rows are read as integers
TOP = 64  # largest rounded value of h: two products with bytes fit the 16 bits in which older processors add them
REST = 128  # steps of the rest, which is at most half a step of the rounded value, so at most TOP again
TINY = np.finfo(np.float32).tiny


def candidate_logits(
    b: Builder,
    config: DMPTConfig,
    weights: Weights,
    leaf: str,
    group: list[int],
    h: ir.Value,
    moves: Mapping[int, ir.Value],
    candidates: ir.Value,
) -> tuple[ir.Value, bool]:
    """Logits of the heads of one of groups(), and whether they are to be added to the anchor's: h [1, n, E],
    candidates [1, n, K] -> [1, n, heads, K]. moves: see dmpt_export.graph.projected.projections."""
    if group[0] in moves:
        return projected_logits(b, config, weights, leaf, group, moves, candidates), True
    stored = [weights[config.head_name(j)] for j in group]
    if deltas := [head for head in stored if isinstance(head, DeltaTensor)]:
        return delta_logits(b, config, group, deltas, h, candidates), True
    return _Rows(b, config, weights, group).logits(h, candidates), False


def groups(config: DMPTConfig, weights: Weights, leaf: str) -> list[list[int]]:
    """The leaf's heads besides its anchor, in order; the heads of a list are stored and read together."""
    allocated = [j for heads in config.head_allocation.values() for j in heads]
    whole = {config.matrix_of(name, heads[0]) for name, heads in config.head_allocation.items()}  # scored fully
    _, *others = config.head_allocation[leaf]

    def kind(j: int) -> object:
        return PROJECTED if j in config.projected_heads else form_of(weights[config.head_name(j)]).layout

    def alone(j: int) -> bool:
        """Whether nothing else reads the head's matrix; a projected head has none."""
        own = allocated.count(j) == 1 and j not in whole and config.head_name(j) == f"heads.{j}.weight"
        return own or j in config.projected_heads

    out = [others[:1]]
    for before, j in pairwise(others):
        if kind(before) == kind(j) and alone(before) and alone(j):
            out[-1].append(j)
        else:
            out.append([j])
    return out


class _Rows:
    """The heads of one group, and the ways to read their rows."""

    def __init__(self, b: Builder, config: DMPTConfig, weights: Weights, heads: list[int]) -> None:
        self.b = b
        self.width = config.n_embd
        self.k = config.fast_k or 0
        names = [config.head_name(j) for j in heads]
        self.stored = [form_of(weights[name]) for name in names]
        numbers = "_".join(str(j) for j in heads)
        self.weight_name = names[0] if len(heads) == 1 else f"heads.{numbers}.weight"
        self.name = f"{self.weight_name.removesuffix('.weight')}.rows"

    def op(self, op_type: str, *inputs: ir.Value | None, part: str, domain: str = "", **attributes: object) -> ir.Value:
        return self.b.op(op_type, *inputs, name=f"{self.name}.{part}", domain=domain, **attributes)

    def logits(self, h: ir.Value, candidates: ir.Value) -> ir.Value:
        """[1, n, E], [1, n, K] -> [1, n, heads, K]."""
        b = self.b
        flat = self.stored[0].candidates(self, h, candidates)
        by_candidate = self.op("Reshape", flat, b.ints(0, 0, self.k, len(self.stored)), part="by_candidate")
        return self.op("Transpose", by_candidate, part="logits", perm=[0, 1, 3, 2])

    # --- storage ----------------------------------------------------------------------------------

    def interleaved(self, suffix: str, part: Callable[[Form], np.ndarray]) -> ir.Value:
        """The initializer with the rows [V, ...] of all heads side by side along the second axis."""
        if len(self.stored) == 1:
            return self.b.weight(f"{self.weight_name}{suffix}", part(self.stored[0]))
        first = part(self.stored[0])
        shape = (first.shape[0], len(self.stored) * first.shape[1], *first.shape[2:])
        return self.b.lazy_weight(
            f"{self.weight_name}{suffix}",
            first.dtype,
            shape,
            lambda: np.stack([part(head) for head in self.stored], axis=1).reshape(shape),
        )

    def coded(self, which: int) -> ir.Value:
        """Codes of whole rows, [V, heads * blocks, bytes] or [V, heads * bytes] (0), or their scales
        [V, heads * blocks] (1)."""
        part = self.first().row_parts[which]
        return self.interleaved(f".{part}", lambda head: head.graph_part(part))

    # --- the three ways ---------------------------------------------------------------------------

    def from_floats(self, h: ir.Value, candidates: ir.Value) -> ir.Value:
        rows = self.op("Gather", self.interleaved("", self._floats), candidates, part="gathered", axis=0)
        if self.stored[0].bits == 16:
            rows = self.b.cast(rows, f"{self.name}.gathered")
        return self._dot(self.op("Reshape", rows, self.by_head(self.width), part="flat"), h)

    def _floats(self, head: Form) -> np.ndarray:
        """float16 unchanged, float32 in the type of the activations."""
        array = head.graph_part("")
        return array if head.bits == 16 else array.astype(self.b.activations, copy=False)

    def from_dequantized(self, h: ir.Value, candidates: ir.Value) -> ir.Value:
        b, first, activations = self.b, self.stored[0], self.b.activations
        assert isinstance(first, BlockwiseTensor)
        scales = self.interleaved(
            ".scales.rows", lambda head: head.parts()["scales"].astype(activations, copy=False)[..., None]
        )
        zeros = None
        if first.zero_points is not None:  # the operator needs one byte per block
            zeros = self.interleaved(".zero_points.rows", lambda head: head.graph_part("zero_points.rows")[..., None])
        axes = {"gather_axis": 0, "quantize_axis": 2, "bits": first.bits, "block_size": first.block}
        inputs = (self.coded(0), candidates, scales, zeros)
        rows = self.op("GatherBlockQuantized", *inputs, part="gathered", domain=MSFT, **axes)
        padded = first.n_blocks * first.block
        rows = self.op("Reshape", rows, self.by_head(padded), part="flat")
        if padded != self.width:
            rows = self.op("Slice", rows, b.ints(0), b.ints(self.width), b.ints(3), part="unpad")
        return self._dot(rows, h)

    def first(self) -> Coded:
        """The first head; all heads of the group have its layout."""
        head = self.stored[0]
        assert isinstance(head, BlockwiseTensor | PerRowTensor)
        return head

    def by_head(self, width: int) -> ir.Value:
        """Shape of gathered rows, one for each candidate and head; without -1, because n may be 0."""
        return self.b.ints(0, 0, self.k * len(self.stored), width)

    def _dot(self, rows: ir.Value, h: ir.Value) -> ir.Value:
        column = self.op("Unsqueeze", h, self.b.ints(-1), part="column")
        return self.op("MatMul", rows, column, part="dot")

    def from_codes(self, h: ir.Value, candidates: ir.Value) -> ir.Value:
        b, first = self.b, self.first()
        if b.dtype != ir.DataType.FLOAT:
            return self.from_dequantized(h, candidates)
        gathered = self.op("Gather", self.coded(0), candidates, part="gathered", axis=0)
        codes = self.op("Reshape", gathered, self.by_head(first.n_blocks * first.block_bytes), part="codes")
        scales = self.op("Gather", self.coded(1), candidates, part="scales.gathered", axis=0)
        scales = self.op("Reshape", scales, self.by_head(first.n_blocks), part="scales")
        x, step = self._in_steps(first, h)
        if first.bits == 8:
            sums = self._product(codes, first.row_middle, self._columns(first, x))  # (1, n, K * heads, 2 * blocks)
        else:
            sums = self._nibble_product(first, codes, x)
        merge = b.weight(f"const.rescore.merge.{first.bits}.{first.n_blocks}", _merge(first))
        sums = self.op("Cast", sums, part="sums", to=int(ir.DataType.FLOAT))
        by_block = self.op("MatMul", sums, merge, part="by_block")
        scaled = self.op("Mul", by_block, scales, part="scaled")
        total = b.weight(f"const.ones.{first.n_blocks}", np.ones((first.n_blocks, 1), np.float32))
        return self.op("Mul", self.op("MatMul", scaled, total, part="dot"), step, part="unscaled")

    def _in_steps(self, first: Coded, h: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(h in units of a step of its row, padded to whole blocks, the step [1, n, 1, 1]); 4 bits: y, x - y / 16."""
        b = self.b
        missing = first.n_blocks * first.block - self.width
        if missing:
            h = self.op("Pad", h, b.ints(0, 0, 0, 0, 0, missing), part="padded")
        per_byte = 8 // first.bits
        by_byte = b.ints(0, 0, first.n_blocks * first.block_bytes, per_byte)
        x = self.op("Reshape", h, by_byte, part="h")
        if per_byte == 2:
            turn = b.weight("const.rescore.turn", np.array([[0, 1], [1, -1 / 16]], np.float32))
            x = self.op("MatMul", x, turn, part="turned")
        largest = self.op("ReduceMax", self.op("Abs", x, part="abs"), b.ints(2, 3), part="largest", keepdims=1)
        floor = b.weight("const.rescore.floor", np.array(TOP * TINY, np.float32))
        share = b.weight("const.rescore.share", np.array(1 / TOP, np.float32))
        step = self.op("Mul", self.op("Max", largest, floor, part="range"), share, part="step")
        return self.op("Div", x, step, part="in_steps"), step

    def _columns(self, first: Coded, x: ir.Value) -> ir.Value:
        """[1, n, bytes, 1] -> int8 [1, n, bytes, 2 * blocks]: each block's values in its own column, then the rests."""
        b = self.b
        own = np.eye(first.n_blocks, dtype=np.float32).repeat(first.block_bytes, axis=0)
        spread = self.op("Mul", x, b.weight(f"const.rescore.own.{len(own)}.{first.n_blocks}", own), part="spread")
        whole = self.op("Round", spread, part="whole")
        finer = b.weight("const.rescore.rest", np.array(REST, np.float32))
        rest = self.op("Mul", self.op("Sub", spread, whole, part="left"), finer, part="rest")
        columns = self.op("Concat", whole, rest, part="both", axis=3)
        return self.op("Cast", columns, part="columns", to=int(ir.DataType.INT8))

    def _product(self, codes: ir.Value, zero: int, columns: ir.Value) -> ir.Value:
        kind = np.uint8 if zero else np.int8
        zero_point = self.b.weight(f"const.{kind.__name__}.{zero}", np.array(zero, kind))
        return self.op("MatMulInteger", codes, columns, zero_point, part="product")

    def _nibble_product(self, first: Coded, codes: ir.Value, x: ir.Value) -> ir.Value:
        b = self.b
        low = self.op("BitwiseAnd", codes, b.weight("const.uint8.15", np.array(15, np.uint8)), part="low")
        y, rest = b.ops("Split", x, name=f"{self.name}.halves", outputs=2, axis=3, num_outputs=2)
        bytes_ = self._product(codes, 8 + 16 * 8, self._columns(first, y))
        lows = self._product(low, 8, self._columns(first, rest))
        return self.op("Concat", bytes_, lows, part="products", axis=3)


def _merge(first: Coded) -> np.ndarray:
    """Matrix that sums the columns of each block: [columns, blocks]."""
    weights = [1, 1 / REST] if first.bits == 8 else [1 / 16, 1 / 16 / REST, 1, 1 / REST]
    return np.concatenate([np.eye(first.n_blocks, dtype=np.float32) * np.float32(w) for w in weights])
