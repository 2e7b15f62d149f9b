"""bitsandbytes' quantizers, run on the CPU; the result is stored so that nothing needs bitsandbytes afterwards.

NF4 and FP4 are for block layers: ONNX Runtime multiplies by them (MatMulBnb4) but cannot look up a row. int8 is the
weight part of LLM.int8 (Dettmers et al. 2022): one scale per output row, absmax / 127, stored in blocks that repeat
the row's scale, as MatMulNBits needs. The activation part, with outliers in half precision, has no operator and is not
exported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.codebook import BLOCKS, CodebookTensor
from quant.forms.packing import fit_block
from quant.schemes.blockwise import check_matrix
from training.errors import InputError, install

SMALLEST = np.float32(1e-36)  # largest magnitudes of a row: 127 over less overflows float32
MISSING = f"bitsandbytes is not installed: {install('bnb')}"


def nf4(array: NDArray[np.float32], block: int = 64) -> CodebookTensor:
    """4 bits, values at the quantiles of a normal distribution; see `four_bits`."""
    return four_bits(array, block, "nf4")


def fp4(array: NDArray[np.float32], block: int = 64) -> CodebookTensor:
    """4-bit floating-point numbers; see `four_bits`."""
    return four_bits(array, block, "fp4")


def four_bits(array: NDArray[np.float32], block: int, scheme: str) -> CodebookTensor:
    """bitsandbytes.functional.quantize_4bit: float32 [N, K] -> CodebookTensor.

    Raises InputError for NaN, infinity, a block that bitsandbytes or the kernels do not support, and without
    bitsandbytes.
    """
    check_matrix(array)
    if block not in BLOCKS:
        raise InputError(f"{scheme} has blocks of {', '.join(map(str, BLOCKS))}, not {block}")
    packed, state = _functional().quantize_4bit(_tensor(array), blocksize=block, quant_type=scheme)
    scales = state.absmax.numpy().astype(np.float32)
    return CodebookTensor(packed.numpy().reshape(-1), scales, scheme, block, (array.shape[0], array.shape[1]))


def int8(array: NDArray[np.float32]) -> BlockwiseTensor:
    """bitsandbytes.functional.int8_vectorwise_quant: float32 [N, K] -> BlockwiseTensor, 8 bits in blocks.

    Raises InputError for NaN and infinity, and without bitsandbytes.
    """
    check_matrix(array)
    n, k = array.shape
    codes, largest, _ = _functional().int8_vectorwise_quant(_tensor(array))
    scales = largest.numpy().astype(np.float32) / np.float32(127)
    empty = largest.numpy() < SMALLEST  # exact zeros, where bitsandbytes divides by zero
    block = next((size for size in (256, 128, 64, 32) if k % size == 0), fit_block(32, k))
    blocks = -(-k // block)
    packed = np.full((n, blocks * block), 128, np.uint8)
    packed[:, :k] = np.where(empty[:, None], 0, codes.numpy()).astype(np.uint8) + np.uint8(128)  # modulo 256
    repeated = np.where(empty, np.float32(0), scales)[:, None].repeat(blocks, axis=1)
    return BlockwiseTensor(packed.reshape(n, blocks, block), repeated, None, 8, block, (n, k), "bnb-int8")


def _functional() -> Any:
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise InputError(MISSING) from error


def _tensor(array: NDArray[np.float32]) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
