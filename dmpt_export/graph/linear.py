"""One weight, three uses, for every storage scheme.

    linear          y = x W + b of a block          (float: MatMul, n-bit: MatMulNBits, W8A8: DynamicQuantizeMatMul,
                                                     NF4 and FP4: MatMulBnb4)
    project         all logits of a head            (float: FusedMatMul with the rows as they are stored)
    gather_rows     some rows of the embedding       (float: Gather, n-bit: GatherBlockQuantized)

Rows of heads on candidates are read by dmpt_export.graph.rescore. A matrix used both ways (a tied embedding, a head
that is one leaf's anchor and another's candidate) is stored once: the n-bit tensor [N, blocks, bytes] serves
MatMulNBits as it is and GatherBlockQuantized along its last axis; only the scales need a second shape. Products in a
branch own their scales and zero points (Builder.own_weight).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.builder import MSFT, Builder
from quant.codebook import CodebookTensor, HalfTensor, in_layout
from quant.tensor import QuantizedTensor, Weight

Weights = Mapping[str, Weight]
BNB4_TYPES = {"fp4": 0, "nf4": 1}  # attribute quant_type of MatMulBnb4
# Level 4 lets the kernel quantize activations to int8 block by block: 0.4-0.9 % of the largest output in error,
# a hundred times faster than level 0 for 8-bit weights.
ACCURACY_LEVEL = 4


def float_weight(b: Builder, weights: Weights, name: str) -> ir.Value:
    """A matrix or vector in the graph's activation type and the checkpoint's layout, which is float in its scheme."""
    array = weights[name]
    if isinstance(array, HalfTensor):
        half = b.weight(name, in_layout(array.packed, array.transposed))
        return from_half(b, half, name)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is quantized as {array.scheme} but no quantized operator reads it")
    return b.weight(name, array.astype(b.dtype.numpy(), copy=False))


def from_half(b: Builder, half: ir.Value, name: str) -> ir.Value:
    """float16 in the graph's activation type. Of a whole weight ONNX Runtime does it once, as it loads the model."""
    if b.dtype == ir.DataType.FLOAT16:
        return half
    return b.op("Cast", half, name=f"{name}.cast", to=int(b.dtype))


def linear(b: Builder, weights: Weights, name: str, x: ir.Value) -> ir.Value:
    """x W + bias for a block's layer `name`: [..., in] -> [..., out]."""
    weight = weights[f"{name}.weight"]
    bias = float_weight(b, weights, f"{name}.bias")
    if isinstance(weight, QuantizedTensor):
        if weight.scheme == "int8-dynamic":
            return _dynamic_matmul(b, name, weight, x, bias)
        return nbits_matmul(b, name, f"{name}.weight", weight, x, bias)
    if isinstance(weight, CodebookTensor):
        y = _bnb4_matmul(b, name, weight, x)
    else:
        y = b.op("MatMul", x, float_weight(b, weights, f"{name}.weight"), name=name)
    return b.op("Add", y, bias, name=f"{name}.bias_add")


def project(b: Builder, weights: Weights, name: str, x: ir.Value) -> ir.Value:
    """Logits over the whole vocabulary: [..., E] -> [..., V], for a matrix stored [V, E]."""
    weight = weights[f"{name}.weight"]
    if isinstance(weight, QuantizedTensor):
        return nbits_matmul(b, name, f"{name}.weight", weight, x)
    # transB keeps the rows contiguous, so that the same initializer can be gathered from.
    matrix = float_weight(b, weights, f"{name}.weight")
    return b.op("FusedMatMul", x, matrix, name=name, domain=MSFT, transB=1)


def gather_rows(b: Builder, weights: Weights, weight_name: str, ids: ir.Value, name: str) -> ir.Value:
    """Rows of a matrix stored [V, E]: ids [B, S] -> [B, S, E]. Ids must be valid: the kernel does not check."""
    weight = weights[weight_name]
    if isinstance(weight, HalfTensor):
        rows = b.op("Gather", b.weight(weight_name, weight.packed), ids, name=f"{name}.half")
        return from_half(b, rows, name)
    if not isinstance(weight, QuantizedTensor):
        return b.op("Gather", float_weight(b, weights, weight_name), ids, name=name)
    rows = gather_blocks(b, weight_name, weight, ids, name)
    width = weight.packed.shape[1] * weight.block
    # 0 copies a leading dimension of the ids [B, S]. No -1: there may be no rows.
    flat = b.op("Reshape", rows, b.ints(0, 0, width), name=f"{name}.flat")
    if width == weight.shape[1]:
        return flat
    return b.op("Slice", flat, b.ints(0), b.ints(weight.shape[1]), b.ints(2), name=f"{name}.unpad")


def gather_blocks(b: Builder, weight_name: str, weight: QuantizedTensor, ids: ir.Value, name: str) -> ir.Value:
    """Rows of a blockwise matrix as they are parted: ids [...] -> [..., blocks, block]."""
    zero_points = None
    if weight.zero_points is not None:  # the operator wants a byte for each block
        zero_points = b.weight(f"{weight_name}.zero_points.rows", weight.offsets[..., None])
    return b.op(
        "GatherBlockQuantized",
        b.weight(f"{weight_name}.packed", weight.packed),
        ids,
        b.weight(f"{weight_name}.scales.rows", _scales(b, weight)[..., None]),
        zero_points,
        name=name,
        domain=MSFT,
        bits=weight.bits,
        block_size=weight.block,
        gather_axis=0,
        quantize_axis=2,
    )


def nbits_matmul(
    b: Builder, name: str, weight_name: str, weight: QuantizedTensor, x: ir.Value, bias: ir.Value | None = None
) -> ir.Value:
    """x W^T + bias for a blockwise matrix [N, K]: [..., K] -> [..., N]."""
    zero_points = None
    if weight.zero_points is not None:
        zero_points = b.own_weight(f"{weight_name}.zero_points", weight.zero_points)
    return b.op(
        "MatMulNBits",
        x,
        b.weight(f"{weight_name}.packed", weight.packed),
        b.own_weight(f"{weight_name}.scales", _scales(b, weight)),
        zero_points,
        None,
        bias,
        name=name,
        domain=MSFT,
        N=weight.shape[0],
        K=weight.shape[1],
        bits=weight.bits,
        block_size=weight.block,
        accuracy_level=ACCURACY_LEVEL,
    )


def _scales(b: Builder, weight: QuantizedTensor | CodebookTensor) -> np.ndarray:
    """Scales as they are stored, in the graph's activation type."""
    return weight.scales.astype(b.dtype.numpy(), copy=False)


def _bnb4_matmul(b: Builder, name: str, weight: CodebookTensor, x: ir.Value) -> ir.Value:
    return b.op(
        "MatMulBnb4",
        x,
        b.weight(f"{name}.weight.packed", weight.packed),
        b.weight(f"{name}.weight.scales", _scales(b, weight)),
        name=name,
        domain=MSFT,
        N=weight.shape[0],
        K=weight.shape[1],
        block_size=weight.block,
        quant_type=BNB4_TYPES[weight.scheme],
    )


def _dynamic_matmul(b: Builder, name: str, weight: QuantizedTensor, x: ir.Value, bias: ir.Value) -> ir.Value:
    return b.op(
        "DynamicQuantizeMatMul",
        x,
        b.weight(f"{name}.weight.int8", weight.packed.T),
        b.weight(f"{name}.weight.scales", weight.scales),
        None,
        bias,
        name=name,
        domain=MSFT,
    )
