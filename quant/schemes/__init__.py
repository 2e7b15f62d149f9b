"""Every way to quantize a matrix, by name. A scheme is one pure function in one file and one line here.

Signature: ``scheme(array, **options) -> QuantizedTensor`` with array float32 [N, K], K the reduction axis. Options:
`block` where the scheme has blocks, `symmetric` where zero points are a choice, `inputs` (quant.calibration.Inputs of
the layer) where it is calibrated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.schemes.blockwise import int2, int3, int4, int8
from quant.schemes.gptq import int2_gptq, int3_gptq, int4_gptq
from quant.schemes.hqq import int4_hqq
from quant.schemes.per_row import int8_dynamic
from quant.tensor import MAX_BLOCK, MIN_BLOCK, QuantizedTensor


@dataclass(frozen=True)
class Scheme:
    """A way to store a matrix: its function and what the rest of the package must know about it."""

    quantize: Callable[..., QuantizedTensor]
    bits: int  # of a code, without scales
    blocks: bool = True  # a scale per `block` inputs; else one way only
    rows: bool = True  # single rows can be looked up: fit for the embedding and the heads
    calibrated: bool = False  # wants `inputs`, what the layer sees on calibration text
    zero_points: bool = True  # can be had symmetric or with zero points; else one way only
    block_range: tuple[int, int] = (MIN_BLOCK, MAX_BLOCK)  # that have a fast kernel

    def __call__(self, array: NDArray[np.float32], **options: Any) -> QuantizedTensor:
        return self.quantize(array, **options)


TWO_BITS = (32, 128)  # ONNX Runtime 1.32 takes 16 and 256, too, but some hundred times slower

SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(int8, 8),
    "int8-dynamic": Scheme(int8_dynamic, 8, blocks=False, rows=False, zero_points=False),
    "int4": Scheme(int4, 4),
    "int4-hqq": Scheme(int4_hqq, 4, zero_points=False),
    "int4-gptq": Scheme(int4_gptq, 4, calibrated=True),
    "int3": Scheme(int3, 3),
    "int3-gptq": Scheme(int3_gptq, 3, calibrated=True),
    "int2": Scheme(int2, 2, block_range=TWO_BITS),
    "int2-gptq": Scheme(int2_gptq, 2, calibrated=True, block_range=TWO_BITS),
}
