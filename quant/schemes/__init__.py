"""Every way to quantize a matrix, by name. A scheme is one pure function in one file and one line here.

Signature: ``scheme(array, **options) -> QuantizedTensor`` with array float32 [N, K], K the reduction axis. Options:
`block` where the scheme has blocks, `inputs` (quant.calibration.Inputs of the layer) where it is calibrated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.schemes.blockwise import int4, int8
from quant.schemes.per_row import int8_dynamic
from quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Scheme:
    """A way to store a matrix: its function and what the rest of the package must know about it."""

    quantize: Callable[..., QuantizedTensor]
    bits: int  # of a code, without scales
    blocks: bool = True  # a scale per `block` inputs; else one way only
    rows: bool = True  # single rows can be looked up: fit for the embedding and the heads
    calibrated: bool = False  # wants `inputs`, what the layer sees on calibration text

    def __call__(self, array: NDArray[np.float32], **options: Any) -> QuantizedTensor:
        return self.quantize(array, **options)


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(int8, 8),
    "int8-dynamic": Scheme(int8_dynamic, 8, blocks=False, rows=False),
    "int4": Scheme(int4, 4),
}
