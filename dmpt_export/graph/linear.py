"""Three uses of a weight, for every storage form (quant.forms has the operators of each).

    linear          y = x W + b of a block
    project         all logits of a head
    gather_rows     some rows of the embedding

dmpt_export.graph.rescore and projected read rows of heads on candidates. A matrix used both ways (a tied embedding, a
head that is the anchor of one leaf but not of another) is stored once: MatMulNBits reads the n-bit tensor
[N, blocks, bytes] unchanged, GatherBlockQuantized along its last axis; only the scales need a second shape.
"""

from __future__ import annotations

import onnx_ir as ir

from dmpt_export.graph.builder import Builder
from quant.forms.plain import FloatTensor
from quant.forms.weights import Weights, form_of


def float_weight(b: Builder, weights: Weights, name: str) -> ir.Value:
    """A vector or never-quantized matrix in the graph's activation type and the checkpoint's layout."""
    form = form_of(weights[name])
    if not isinstance(form, FloatTensor):
        raise TypeError(f"{name} is quantized as {form.scheme} but no quantized operator reads it")
    value: ir.Value = form.value(b, name)
    return value


def linear(b: Builder, weights: Weights, name: str, x: ir.Value) -> ir.Value:
    """x W + bias for a block's layer `name`: [..., in] -> [..., out]."""
    bias = float_weight(b, weights, f"{name}.bias")
    y: ir.Value = form_of(weights[f"{name}.weight"]).product(b, name, f"{name}.weight", x, bias)
    return y


def project(b: Builder, weights: Weights, name: str, x: ir.Value) -> ir.Value:
    """Logits over the whole vocabulary: [..., E] -> [..., V], for a matrix stored [V, E]."""
    logits: ir.Value = form_of(weights[f"{name}.weight"]).logits(b, name, x)
    return logits


def gather_rows(b: Builder, weights: Weights, weight_name: str, ids: ir.Value, name: str) -> ir.Value:
    """Rows of a matrix stored [V, E]: ids [B, S] -> [B, S, E]. Ids must be valid: the kernel does not check."""
    rows: ir.Value = form_of(weights[weight_name]).gather(b, name, weight_name, ids)
    return rows
