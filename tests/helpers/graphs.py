"""Run small graphs, and bound the rounding of their integer kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from runtime.ort import import_onnxruntime

EPS = np.finfo(np.float32).eps


def run(op: str, x: NDArray[Any], constants: list[NDArray[Any] | None], **attributes: int) -> NDArray[np.float32]:
    """One com.microsoft operator, its first or second (gathering) input fed, the others initializers."""
    names = ["" if array is None else f"c{i}" for i, array in enumerate(constants)]
    initializers = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        for name, array in zip(names, constants, strict=True)
        if array is not None
    ]
    inputs = [names[0], "x", *names[1:]] if op == "GatherBlockQuantized" else ["x", *names]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return y


def rounding(x: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bound on the error of a float32 product: [rows, N]."""
    return (x.shape[1] + 2) * EPS * (np.abs(x) @ np.abs(matrix).T)
