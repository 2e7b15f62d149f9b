"""The earliest ONNX Runtime with every operator of a graph.

Measured: exports of each kind were loaded and run on x86 with onnxruntime 1.19 to 1.32. Versions before EARLIEST were
not tested with everything else that this project needs.
"""

from __future__ import annotations

import onnx_ir as ir

EARLIEST = (1, 20)
OPSETS = {22: (1, 21), 23: (1, 23), 24: (1, 24)}  # of the standard operators
# (operator, attribute, value) -> first version
SINCE = {
    ("MatMulNBits", "bits", 8): (1, 22),
    ("MatMulNBits", "bits", 2): (1, 24),
    ("GatherBlockQuantized", "bits", 8): (1, 23),  # no `bits` before
    ("GatherBlockQuantized", "bits", 4): (1, 23),
    ("GatherBlockQuantized", "bits", 2): (1, 27),
    ("GroupQueryAttention", "qk_output", 2): (1, 23),
    ("GroupQueryAttention", "kv_cache_bit_width", 8): (1, 28),  # 1.27 has it, but gives wrong results for batches
}
ATTENTION_BIAS, BIAS_SINCE = 10, (1, 22)  # input of GroupQueryAttention; 1.21 refuses the graph


def least_onnxruntime(model: ir.Model) -> str:
    """Such as "1.23"."""
    versions = [EARLIEST, OPSETS.get(model.graph.opset_imports[""], EARLIEST)]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "GroupQueryAttention" and any(node.inputs[ATTENTION_BIAS : ATTENTION_BIAS + 1]):
            versions.append(BIAS_SINCE)
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.INT:
                versions.append(SINCE.get((node.op_type, name, attribute.as_int()), EARLIEST))
    return ".".join(map(str, max(versions)))
