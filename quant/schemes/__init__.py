"""All quantization schemes by name. A scheme is one pure function in one file and one line here.

Signature: ``scheme(array, **options) -> Form`` (quant.forms) with array float32 [N, K], K the reduction axis.
Options: `block` if the scheme has blocks, `symmetric` if zero points are a choice, `inputs`
(quant.calibration.Inputs of the layer) if it is calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.codebook import CodebookTensor
from quant.forms.form import Form
from quant.forms.half import HalfTensor
from quant.forms.packing import MAX_BLOCK, MIN_BLOCK
from quant.forms.per_row import PerRowTensor
from quant.schemes import bnb
from quant.schemes.blockwise import int2, int3, int4, int8
from quant.schemes.gptq import int2_gptq, int3_gptq, int4_gptq
from quant.schemes.half import fp16
from quant.schemes.hqq import int4_hqq
from quant.schemes.per_row import int8_dynamic
from training.errors import InputError


class Rounding(Enum):
    """How far kernels may deviate from float arithmetic; the numbers are in dmpt_export.check.tolerances."""

    NONE = "float kernels"
    ACTIVATIONS = "activations rounded by block"
    COARSE = "activations rounded as a whole"


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme: its function and the properties that the rest of the package needs."""

    quantize: Callable[..., Form]
    bits: int  # of a code, without scales
    form: type[Form] = BlockwiseTensor  # what the function returns
    rounding: Rounding = Rounding.ACTIVATIONS  # of the CPU kernels
    blocks: bool = True  # has an option `block`: a scale per `block` inputs
    rows: bool = True  # single rows can be looked up, as the embedding and the heads need
    vocabulary: str | None = None  # what the embedding and the heads get beside layers in this scheme; None: the same
    calibrated: bool = False  # needs `inputs`: the layer's inputs on calibration text
    zero_points: bool = True  # has an option `symmetric`: with or without zero points
    block_range: tuple[int, int] = (MIN_BLOCK, MAX_BLOCK)  # blocks with a fast kernel
    package: str | None = None  # needed to quantize, but not to load or export

    def __call__(self, array: NDArray[np.float32], **options: Any) -> Form:
        return self.quantize(array, **options)


TABLE_OF_16: dict[str, Any] = {
    "form": CodebookTensor,
    "rounding": Rounding.NONE,
    "rows": False,
    "vocabulary": "int8",
    "zero_points": False,
    "block_range": (32, MAX_BLOCK),
    "package": "bitsandbytes",
}
TWO_BITS = (32, 128)  # ONNX Runtime 1.32 takes 16 and 256, too, but some hundred times slower

SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(int8, 8),
    "int8-dynamic": Scheme(
        int8_dynamic, 8, PerRowTensor, Rounding.COARSE, blocks=False, vocabulary="int8", zero_points=False
    ),
    "int4": Scheme(int4, 4),
    "int4-hqq": Scheme(int4_hqq, 4, zero_points=False),
    "int4-gptq": Scheme(int4_gptq, 4, calibrated=True),
    "int3": Scheme(int3, 3),
    "int3-gptq": Scheme(int3_gptq, 3, calibrated=True),
    "int2": Scheme(int2, 2, block_range=TWO_BITS),
    "int2-gptq": Scheme(int2_gptq, 2, calibrated=True, block_range=TWO_BITS),
    "nf4": Scheme(bnb.nf4, 4, **TABLE_OF_16),
    "fp4": Scheme(bnb.fp4, 4, **TABLE_OF_16),
    "bnb-int8": Scheme(bnb.int8, 8, blocks=False, zero_points=False, package="bitsandbytes"),
    "fp16": Scheme(fp16, 16, HalfTensor, Rounding.NONE, blocks=False, zero_points=False),
}


def check_installed(schemes: Iterable[str]) -> None:
    """Raise InputError with the `pip install` command when a scheme's package is missing; runs before other work."""
    for scheme in schemes:
        package = SCHEMES[scheme].package if scheme in SCHEMES else None
        if package and find_spec(package) is None:
            raise InputError(f"{scheme}: {bnb.MISSING}")
