"""int8 with one scale per output row, for kernels that quantize activations on the fly (W8A8)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant.forms.per_row import PerRowTensor
from quant.schemes.blockwise import TINY, check_matrix

# Processors without VNNI (most x86 before 2020, AMD before Zen 4) add two products of a code and an 8-bit activation in
# 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127 saturates silently. What the lost bit costs: docs/quantize.md.
TOP = 64


def int8_dynamic(array: NDArray[np.float32]) -> PerRowTensor:
    """Round to nearest, symmetric, codes in -64..64: array float32 [N, K] -> packed int8 [N, K], scales [N].

    DynamicQuantizeMatMul takes the transpose, [K, N], and no zero point. Raises InputError for NaN and infinity.
    """
    check_matrix(array)
    scales = np.abs(array).max(axis=1).astype(np.float32) / np.float32(TOP)
    scales[scales < TINY] = 0  # an all-zero row: exact zeros
    codes = np.rint(array / np.where(scales, scales, 1)[:, None]).clip(-TOP, TOP).astype(np.int8)
    return PerRowTensor(codes, scales, (array.shape[0], array.shape[1]), "int8-dynamic")
