"""SmoothQuant: balance activations and weights before int8-dynamic, whose activations share one scale.

Input j of a layer is divided by s_j and its weights are multiplied by it. The division is folded into the layer that
computes the input: the norm before c_attn and c_fc, and for attn.c_proj the value part of c_attn (attention only
averages values). The float model computes the same. mlp.c_proj follows a gelu, which no scale can be moved through.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

Source: Xiao et al., "SmoothQuant" (2022), arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError

ALPHA = 0.5
Arrays = dict[str, NDArray[np.float32]]
FOLDED = ("attn.c_attn", "mlp.c_fc", "attn.c_proj")  # layers whose inputs can be balanced
LEAST, MOST = 1e-3, 1e3  # limits of a factor over the layer's median: beyond them only precision would be lost


def smooth(arrays: Arrays, largest: Mapping[str, NDArray[np.float32]], alpha: float = ALPHA) -> Arrays:
    """Balanced copies of the tensors that change, the others unchanged: checkpoint names -> float32 arrays.

    `largest` maps the weights to be balanced (`...attn.c_attn.weight` and so on) to max |x| of each input [K]; other
    names are ignored. Raises InputError for an alpha outside 0..1.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"smoothing {alpha} must be from 0 (weights unchanged) to 1 (all activations of equal size)")
    out = dict(arrays)
    for name, peak in largest.items():
        layer, _, _ = name.rpartition(".")
        block, _, which = layer.partition(".h.")[2].partition(".")
        if which not in FOLDED:
            continue
        stem = f"{layer.partition('.h.')[0]}.h.{block}"
        factors = _factors(peak, np.abs(out[name]).max(axis=1), alpha)  # block weights are [in, out]
        out[name] = out[name] * factors[:, None]
        if which == "attn.c_proj":
            width = len(factors)
            for part in ("weight", "bias"):  # q, k, v side by side
                values = out[f"{stem}.attn.c_attn.{part}"].copy()
                values[..., 2 * width :] /= factors
                out[f"{stem}.attn.c_attn.{part}"] = values
        else:
            norm = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}[which]
            for part in ("weight", "bias"):
                out[f"{stem}.{norm}.{part}"] = out[f"{stem}.{norm}.{part}"] / factors
    return out


def _factors(inputs: NDArray[np.float32], weights: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """s [K]; 1 for inputs that are always zero or have no weights."""
    usable = (inputs > 0) & (weights > 0)
    s = np.ones(len(inputs))
    s[usable] = inputs[usable].astype(np.float64) ** alpha / weights[usable].astype(np.float64) ** (1 - alpha)
    middle = np.median(s[usable]) if usable.any() else 1.0
    return np.where(usable, (s / middle).clip(LEAST, MOST), 1).astype(np.float32)
