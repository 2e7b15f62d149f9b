"""The tensors of a checkpoint by name, float or quantized."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quant.forms.form import Form
from quant.forms.plain import FloatTensor

Weight = NDArray[np.float32] | Form  # an array: float32, not quantized
Weights = Mapping[str, Weight]


def form_of(weight: Weight) -> Form:
    """The storage form of a tensor."""
    return weight if isinstance(weight, Form) else FloatTensor(weight)


def quantized(weights: Weights) -> dict[str, Form]:
    """The quantized tensors only."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, Form)}
