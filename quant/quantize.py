"""Quantize float tensors one at a time, and report the damage of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.calibration import Inputs
from quant.deltas import groups, quantize_group
from quant.forms.delta import DeltaTensor
from quant.forms.form import Form
from quant.forms.weights import Weight
from quant.rules import FLOAT, Rule, is_transposed
from quant.schemes import SCHEMES
from training.errors import InputError
from training.progress import Bar

ERROR_ROWS = 4096  # output rows compared at a time, so that a large embedding is never in memory twice in float


@dataclass(frozen=True)
class TensorReport:
    """Size and error of one quantized tensor."""

    name: str
    scheme: str
    block: int | None  # weights that share a scale; None without blocks (float32, one scale per row)
    weights: int
    bytes_before: int
    bytes_after: int
    relative_error: float  # ||W - dequantized|| / ||W||, Frobenius; 0 for an all-zero tensor
    all_zero: bool = False
    kl: float | None = None  # nats per token on calibration text, with this tensor alone quantized; None: not measured
    delta_error: float | None = None  # for a head delta: the same error over ||W - anchor as stored||

    @property
    def bits(self) -> float:
        """Bits per weight, including scales and zero points."""
        return 8 * self.bytes_after / self.weights


def quantize_tensors(
    arrays: dict[str, NDArray[np.float32]],
    plan: Mapping[str, Rule],
    observed: Iterable[Mapping[str, Inputs]] = (),
    anchors: Mapping[str, set[str]] = MappingProxyType({}),
) -> tuple[dict[str, Weight], list[TensorReport]]:
    """Quantize the tensors in `plan` and pass the rest through, with a progress bar on a terminal.

    `observed` yields the inputs of calibrated tensors, a few at a time (quant.calibration.observe); `anchors`: see
    quant.rules.anchors_of. Empties `arrays` on the way, so that float and quantized weights are never both complete in
    memory. Heads that become deltas come last.
    """
    order = list(arrays)
    weights: dict[str, Weight] = {}
    reports: dict[str, TensorReport] = {}
    deltas = list(groups(plan, anchors))
    late = {name for _, _, names in deltas for name in names}
    total = sum(arrays[name].size for name in plan)
    with Bar(total=total, unit=" weights", unit_scale=True, desc="quantize", leave=False) as bar:

        def take(name: str, inputs: Inputs | None) -> None:
            bar.set_postfix_str(name)
            array = arrays.pop(name)
            weights[name], reports[name] = quantize_tensor(name, array, plan[name], inputs)
            bar.update(array.size)

        for seen in observed:
            for name, inputs in seen.items():
                take(name, inputs)
        for name in [name for name in order if name in arrays and name not in late]:
            if name in plan:
                take(name, None)
            else:
                array = weights[name] = arrays.pop(name)
                reports[name] = float_report(name, array)
        for anchor, rule, names in deltas:
            bar.set_postfix_str(", ".join(names))
            heads = {name: arrays.pop(name) for name in names}
            for name, tensor in quantize_group(heads, anchor, weights[anchor], rule).items():
                weights[name], reports[name] = tensor, delta_report(name, heads[name], tensor)
                bar.update(heads[name].size)
    return {name: weights[name] for name in order}, [reports[name] for name in order]


def delta_report(name: str, head: NDArray[np.float32], tensor: DeltaTensor) -> TensorReport:
    """Report of a head stored as a delta."""
    damage = relative_error(tensor, head)
    size = float(np.linalg.norm(head - tensor.anchor.dequantize()))
    lost = damage * float(np.linalg.norm(head)) / size if size else 0.0
    sizes = (head.size, head.nbytes, tensor.nbytes)
    return TensorReport(name, tensor.scheme, tensor.block, *sizes, damage, all_zero=not head.any(), delta_error=lost)


def quantize_tensor(
    name: str, array: NDArray[np.float32], rule: Rule, inputs: Inputs | None = None
) -> tuple[Form, TensorReport]:
    """Quantize one tensor in the checkpoint's layout, with its report. Raises InputError naming the tensor."""
    transposed = is_transposed(name)
    matrix = np.ascontiguousarray(array.T if transposed else array)  # (N, K)
    scheme = SCHEMES[rule.scheme]
    options: dict[str, Any] = {} if rule.block is None else {"block": rule.block}
    if rule.asymmetric:
        options["symmetric"] = False
    if scheme.calibrated:
        options["inputs"] = inputs
    try:
        with np.errstate(over="raise", invalid="raise"):
            tensor = scheme(matrix, **options).as_transposed(transposed)
        if not all(np.isfinite(part).all() for part in tensor.parts().values()):  # not every operation raises
            raise FloatingPointError
    except FloatingPointError:
        raise InputError(f"tensor '{name}': its weights are too large for scales in float32") from None
    except InputError as error:
        raise error.after(f"tensor '{name}': ") from error
    stored = (tensor.scheme, tensor.block if SCHEMES[rule.scheme].blocks else None)
    damage = relative_error(tensor, matrix)
    sizes = (array.size, array.nbytes, tensor.nbytes)
    return tensor, TensorReport(name, *stored, *sizes, damage, all_zero=not matrix.any())


def float_report(name: str, array: NDArray[np.float32]) -> TensorReport:
    """Report of a tensor that stays unchanged."""
    return TensorReport(name, FLOAT, None, array.size, array.nbytes, array.nbytes, 0.0, all_zero=not array.any())


def relative_error(tensor: Form, matrix: NDArray[np.float32]) -> float:
    """||matrix - dequantized|| / ||matrix|| (Frobenius) for a matrix [N, K]; 0 for an all-zero matrix."""
    damage = norm = 0.0
    for start in range(0, len(matrix), ERROR_ROWS):
        rows = slice(start, start + ERROR_ROWS)
        damage += float(np.square(tensor.rows(rows) - matrix[rows], dtype=np.float64).sum())
        norm += float(np.square(matrix[rows], dtype=np.float64).sum())
    return float(np.sqrt(damage / norm)) if norm else 0.0
