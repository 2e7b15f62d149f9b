"""The peer of ONNX Runtime's own quantizers, applied to optimum's float32 export of GPT-2.

quantize_dynamic, and MatMulNBitsQuantizer with rounding to nearest, HQQ and k-quant, blocks of 32. MatMulNBitsQuantizer
only handles MatMul, but GPT-2's layers are exported as Gemm. They are first converted to MatMul and Add; otherwise only
one layer would be quantized. Embeddings stay float, as these tools leave them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.adapters.optimum_onnx import graph, position_bytes

QUANTIZED = "model_quantized.onnx"
BLOCK = 32


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Make an ONNX folder from a Hugging Face GPT-2 folder; scheme: dynamic, or algorithm and bits such as hqq-4."""
    import onnx
    from optimum.onnxruntime import ORTModelForCausalLM

    ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(out)
    plain = Path(out) / "model.onnx"
    model = onnx.load(plain)
    found = gemm_to_matmul(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = sum(node.op_type == "MatMul" and node.input[1] in weights for node in model.graph.node)
    onnx.save(model, plain)
    if scheme == "dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(plain, Path(out) / QUANTIZED, per_channel=True, weight_type=QuantType.QInt8)
    else:
        _n_bits(model, scheme, Path(out) / QUANTIZED)
    for file in Path(out).glob("model.onnx*"):
        file.unlink()
    kernels = ("MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul")
    nodes = onnx.load(Path(out) / QUANTIZED, load_external_data=False).graph.node
    quantized = sum(node.op_type in kernels for node in nodes)
    size = sum(file.stat().st_size for file in Path(out).glob(f"{QUANTIZED}*"))
    touched = size - position_bytes(graph(Path(out)))
    return {"size_bytes": size, "touched_bytes": touched, "layers": layers, "quantized": quantized, "gemms": found}


def _n_bits(model: Any, scheme: str, out: Path) -> None:
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    algorithm, bits = scheme.split("-")
    configs: dict[str, Any] = {
        "rtn": lambda: tool.DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=int(bits)
        ),
        "hqq": lambda: tool.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=int(bits)),
        "kquant": lambda: tool.KQuantWeightOnlyQuantConfig(),
    }
    quantizer = tool.MatMulNBitsQuantizer(
        model, bits=int(bits), block_size=BLOCK, accuracy_level=4, algo_config=configs[algorithm]()
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), use_external_data_format=False)


def gemm_to_matmul(model: Any) -> int:
    """In place: replace every Gemm with plain factors by MatMul and Add; returns their number."""
    import numpy as np
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, found = [], 0
    for node in model.graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = options.get("alpha", 1) == options.get("beta", 1) == 1 and not options.get("transA", 0)
        if node.op_type != "Gemm" or not plain or len(node.input) < 3:
            nodes.append(node)
            continue
        found += 1
        x, matrix, bias = node.input
        if options.get("transB", 0):
            turned = np.ascontiguousarray(numpy_helper.to_array(weights[matrix]).T)
            weights[matrix].CopyFrom(numpy_helper.from_array(turned, matrix))
        product = f"{node.output[0]}.product"
        nodes.append(helper.make_node("MatMul", [x, matrix], [product], name=f"{node.name}.MatMul"))
        nodes.append(helper.make_node("Add", [product, bias], list(node.output), name=f"{node.name}.Add"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return found
