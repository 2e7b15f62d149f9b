"""Every way to quantize a matrix, by name. A scheme is one pure function in one file and one line here.

Signature: ``scheme(array, **options) -> QuantizedTensor`` with array float32 [N, K], K the reduction axis.
"""

from __future__ import annotations

from collections.abc import Callable

from quant.schemes.blockwise import int4, int8
from quant.schemes.per_row import int8_dynamic
from quant.tensor import QuantizedTensor

SCHEMES: dict[str, Callable[..., QuantizedTensor]] = {
    "int8": int8,
    "int8-dynamic": int8_dynamic,
    "int4": int4,
}

# One scale per row and no operator that looks rows up: not for the embedding and the heads.
NO_ROWS = ("int8-dynamic",)
