"""int8 with one scale per output row, for kernels that quantize activations on the fly (W8A8)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant.schemes.blockwise import check_matrix
from quant.tensor import QuantizedTensor

TOP = 127  # -128 is left out: the range stays symmetric and the kernel's products stay in range


def int8_dynamic(array: NDArray[np.float32]) -> QuantizedTensor:
    """Round to nearest, symmetric, codes in -127..127: array float32 [N, K] -> packed int8 [N, K], scales [N].

    DynamicQuantizeMatMul takes the transpose, [K, N], and no zero point. Raises InputError for NaN and infinity.
    """
    check_matrix(array)
    scales = np.abs(array).max(axis=1).astype(np.float32) / np.float32(TOP)
    scales[scales < np.finfo(np.float32).tiny] = 1  # an all-zero row: codes 0, so any finite scale gives exact zeros
    codes = np.rint(array / scales[:, None]).clip(-TOP, TOP).astype(np.int8)
    return QuantizedTensor(codes, scales, None, 8, array.shape[1], (array.shape[0], array.shape[1]), "int8-dynamic")
