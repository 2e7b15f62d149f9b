"""The stored layout against ONNX Runtime's own operators.

Bounds are derived, not chosen: float32 sums of K products are off by at most K * eps * sum |x w|, and an
activation rounded to 8 bits by at most half a step.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from dmpt_export.graph.builder import MSFT, Builder
from quant.forms.blockwise import BlockwiseTensor
from quant.schemes import SCHEMES
from quant.schemes.blockwise import quantize
from runtime.ort import import_onnxruntime
from tests.helpers.graphs import rounding, run

BLOCKS = [16, 32, 64, 128, 256]
SHAPES = [(7, 64), (5, 100), (9, 300), (33, 48), (64, 256)]  # (N, K): whole, padded and shrunk blocks


def random_tensor(n: int, k: int, bits: int, block: int, symmetric: bool) -> BlockwiseTensor:
    array = np.random.default_rng(n * k).normal(0.3, 1, (n, k)).astype(np.float32)
    array[1] = 0
    return quantize(array, bits, block, symmetric)


def matmul_nbits(x: NDArray[np.float32], tensor: BlockwiseTensor, accuracy_level: int) -> NDArray[np.float32]:
    n, k = tensor.shape
    constants = [tensor.packed, tensor.scales, tensor.zero_points]
    sizes = {"N": n, "K": k, "bits": tensor.bits, "block_size": tensor.block}
    return run("MatMulNBits", x, constants, **sizes, accuracy_level=accuracy_level)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matmul_nbits_multiplies_by_the_dequantized_matrix(bits: int, block: int, symmetric: bool) -> None:
    for n, k in SHAPES:
        tensor = random_tensor(n, k, bits, block, symmetric)
        x = np.random.default_rng(k).normal(size=(3, k)).astype(np.float32)
        matrix = tensor.dequantize()
        exact = x.astype(np.float64) @ matrix.T.astype(np.float64)
        assert (np.abs(matmul_nbits(x, tensor, 0) - exact) <= rounding(x, matrix)).all()
        # Level 4 rounds each block of x to 8 bits: at most half of max|x| / 127 for every weight of the block.
        pad = [(0, 0), (0, tensor.n_blocks * tensor.block - k)]
        x_blocks, w_blocks = (np.pad(a, pad).reshape(len(a), tensor.n_blocks, -1) for a in (x, matrix))
        integer_error = np.abs(x_blocks).max(axis=2) / 254 @ np.abs(w_blocks).sum(axis=2).T
        # It adds unsigned codes and takes zero_point * sum(x) off afterwards, so larger numbers are rounded.
        offset = (tensor.offsets * np.abs(tensor.scales)).repeat(tensor.block, axis=1)[:, :k]
        limit = integer_error + rounding(x, np.abs(matrix) + 2 * offset)
        assert (np.abs(matmul_nbits(x, tensor, 4) - exact) <= limit).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gather_block_quantized_gives_the_dequantized_rows_exactly(bits: int, block: int, symmetric: bool) -> None:
    """Symmetric tensors need no zero points: for uint8 data the operator's own is 2**(bits-1), like ours."""
    for n, k in SHAPES:
        tensor = random_tensor(n, k, bits, block, symmetric)
        ids = np.array([[0, n - 1], [1, 0]], np.int64)
        zero_points = None if symmetric else tensor.offsets[:, :, None]
        scales = tensor.scales[:, :, None]
        attributes = {"bits": tensor.bits, "block_size": tensor.block, "gather_axis": 0, "quantize_axis": 2}
        rows = run_gather(tensor, ids, scales, zero_points, attributes)
        assert rows.shape == (2, 2, tensor.n_blocks, tensor.block)
        flat = rows.reshape(2, 2, -1)
        np.testing.assert_array_equal(flat[..., :k], tensor.rows(ids.ravel()).reshape(2, 2, k))
        np.testing.assert_array_equal(flat[..., k:], 0)  # padding


def run_gather(
    tensor: BlockwiseTensor,
    ids: NDArray[np.int64],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    attributes: dict[str, int],
) -> NDArray[np.float32]:
    return run("GatherBlockQuantized", ids, [tensor.packed, scales, zero_points], **attributes)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dynamic_quantize_matmul_takes_the_transpose(n: int, k: int) -> None:
    """B is [K, N] int8 with scales [N] and no zero point. Activations: one uint8 scale and zero point for all of x."""
    rng = np.random.default_rng(k)
    array = rng.normal(size=(n, k)).astype(np.float32)
    array[1] = 0
    tensor = SCHEMES["int8-dynamic"](array)
    x = rng.normal(size=(3, k)).astype(np.float32)
    y = run("DynamicQuantizeMatMul", x, [tensor.packed.T, tensor.scales, None])
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.rint(-low / scale)
    rounded = ((np.rint(x / scale) + zero).clip(0, 255) - zero).astype(np.float32) * scale
    matrix = tensor.dequantize()
    exact = rounded.astype(np.float64) @ matrix.T.astype(np.float64)
    assert (np.abs(y - exact) <= rounding(rounded, matrix)).all()
    assert not y[:, 1].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCKS)
def test_many_rows_are_the_same_rows(bits: int, block: int) -> None:
    """Candidates are read by other operators than a step's token: bit for bit the same, also for no rows."""
    for n, k in SHAPES:
        tensor = random_tensor(n, k, bits, block, symmetric=True)
        b = Builder()
        ids = ir.val("ids", ir.DataType.INT64, [1, "m"])
        rows = tensor.gather_many(b, "rows", "w", ids)
        rows.dtype, rows.shape = ir.DataType.FLOAT, ir.Shape([1, "m", k])
        graph = ir.Graph([ids], [rows], nodes=b.nodes, initializers=list(b.initializers.values()),
                         opset_imports={"": 21, MSFT: 1}, name="rows")  # fmt: skip
        assert any(node.op_type == "DequantizeLinear" for node in b.nodes) == (bits == 8)
        model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        session = import_onnxruntime().InferenceSession(model, providers=["CPUExecutionProvider"])
        for wanted in (np.zeros(0, np.int64), np.array([n - 1]), np.random.default_rng(0).integers(0, n, 40)):
            (got,) = session.run(None, {"ids": wanted[None]})
            np.testing.assert_array_equal(got[0], tensor.dequantize()[wanted])
