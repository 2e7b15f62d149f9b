"""Variants of a graph for checking: without integer arithmetic (stored weights, float activations), and with gates
that send all tokens one way, so that rarely used paths are checked too.

Integer kernels round activations at run time, and this noise hides small faults. With float kernels the exported
weights, layout and routing must give torch's numbers to float32 rounding, so a wrong scale or a swapped tensor shows.
Only then is the deployed graph compared, with its own looser line of the tolerance table.

One limit: integer products of head rows split a vector into its rounded value and the rest. Without rounding the rest
is zero, so only the deployed graph checks the columns that multiply and sum it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper


def has_integer_kernels(model: onnx.ModelProto) -> bool:
    """Whether any node rounds activations, so that the float variant computes something different."""
    kernels = ("MatMulNBits", "DynamicQuantizeMatMul", "MatMulInteger")
    return any(node.op_type in kernels for graph in graphs(model.graph) for node in graph.node)


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without its external weights (a few hundred kB)."""
    return onnx.load(path, load_external_data=False)


def use_float_kernels(model: onnx.ModelProto) -> None:
    """In place: MatMulNBits computes in float32, the others multiply in float, and activations are not rounded."""
    for graph in graphs(model.graph):
        nodes = [new for node in graph.node for new in _in_float(node)]
        del graph.node[:]
        graph.node.extend(nodes)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all branches inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initializers of a graph and of its branches."""
    for part in graphs(graph):
        yield from part.initializer


def use_float_caches(model: onnx.ModelProto) -> None:
    """In place: store keys and values as computed instead of as int8 codes."""
    for graph in graphs(model.graph):
        for node in graph.node:
            if node.op_type == "GroupQueryAttention":
                del node.input[12:]  # the scales
                kept = [a for a in node.attribute if "quant" not in a.name and a.name != "kv_cache_bit_width"]
                del node.attribute[:]
                node.attribute.extend(kept)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == onnx.TensorProto.INT8:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def force_turns(model: onnx.ModelProto, turns: Iterable[tuple[str, int]]) -> None:
    """In place: at each of these split nodes send every token the given way, 0 left or 1 right.

    Only the bias of the gate's last layer changes: minus infinity on the other side, which no weight outweighs.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node, turn in turns:
        bias = stored[f"gates.{node}.2.bias"]
        new = np.where(np.arange(2) == turn, 0, -np.inf).astype(helper.tensor_dtype_to_np_dtype(bias.data_type))
        bias.CopyFrom(numpy_helper.from_array(new, bias.name))


def _in_float(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if node.op_type == "MatMulNBits":
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # fp32
    if node.op_type == "Round":
        return [helper.make_node("Identity", node.input, node.output, name=node.name)]
    if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.INT8:
        return [helper.make_node("Identity", node.input, node.output, name=node.name)]
    if node.op_type == "MatMulInteger":
        return _product(node)
    return _dynamic_product(node) if node.op_type == "DynamicQuantizeMatMul" else [node]


def _product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """(codes - zero point) @ activations, which the casts above left in float."""
    codes, activations, zero = node.input
    whole, offset, signed = (f"{node.name}.{part}" for part in ("codes", "zero", "signed"))
    return [
        helper.make_node("Cast", [codes], [whole], name=whole, to=onnx.TensorProto.FLOAT),
        helper.make_node("Cast", [zero], [offset], name=offset, to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", [whole, offset], [signed], name=signed),
        helper.make_node("MatMul", [signed, activations], list(node.output), name=node.name),
    ]


def _dynamic_product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, codes, scales, _, *bias = node.input
    added = [name for name in bias if name]  # projections of heads have none
    whole, weight, product = (f"{node.name}.{part}" for part in ("codes", "dequantized", "product"))
    result = product if added else node.output[0]
    # Not DequantizeLinear: ONNX Runtime would fuse that with the MatMul into an integer kernel again.
    return [
        helper.make_node("Cast", [codes], [whole], name=whole, to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [whole, scales], [weight], name=weight),
        helper.make_node("MatMul", [x, weight], [result], name=product),
        *(helper.make_node("Add", [product, name], list(node.output), name=node.name) for name in added),
    ]
