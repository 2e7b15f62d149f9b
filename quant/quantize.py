"""Float tensors in, quantized tensors and an account of the damage out, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from quant.calibration import Inputs
from quant.rules import FLOAT, Rule, is_transposed
from quant.schemes import SCHEMES
from quant.tensor import QuantizedTensor, Weight
from training.errors import InputError

ERROR_ROWS = 4096  # output rows compared at a time, so that a large embedding is never whole in float twice


@dataclass(frozen=True)
class TensorReport:
    """What quantizing did to one tensor."""

    name: str
    scheme: str
    block: int | None  # weights that share a scale; None without blocks (float32, one scale per row)
    weights: int
    bytes_before: int
    bytes_after: int
    relative_error: float  # ||W - dequantized|| / ||W||, Frobenius; 0 for an all-zero tensor
    all_zero: bool = False
    kl: float | None = None  # nats per token on calibration text, with this tensor alone quantized; None: not measured

    @property
    def bits(self) -> float:
        """Per weight, scales and zero points included."""
        return 8 * self.bytes_after / self.weights


def quantize_tensors(
    arrays: dict[str, NDArray[np.float32]],
    plan: Mapping[str, Rule],
    observed: Iterable[Mapping[str, Inputs]] = (),
) -> tuple[dict[str, Weight], list[TensorReport]]:
    """Quantize what `plan` names and pass the rest through, with a progress bar on a terminal.

    `observed` gives the inputs of calibrated tensors, some at a time (quant.calibration.observe). Empties `arrays` as
    it goes, so that float and quantized weights are never both whole in memory.
    """
    order = list(arrays)
    weights: dict[str, Weight] = {}
    reports: dict[str, TensorReport] = {}
    total = sum(arrays[name].size for name in plan)
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="quantize", leave=False, disable=None) as bar:

        def take(name: str, inputs: Inputs | None) -> None:
            bar.set_postfix_str(name)
            array = arrays.pop(name)
            weights[name], reports[name] = quantize_tensor(name, array, plan[name], inputs)
            bar.update(array.size)

        for seen in observed:
            for name, inputs in seen.items():
                take(name, inputs)
        for name in [name for name in order if name in arrays]:
            if name in plan:
                take(name, None)
            else:
                array = weights[name] = arrays.pop(name)
                reports[name] = float_report(name, array)
    return {name: weights[name] for name in order}, [reports[name] for name in order]


def quantize_tensor(
    name: str, array: NDArray[np.float32], rule: Rule, inputs: Inputs | None = None
) -> tuple[QuantizedTensor, TensorReport]:
    """One tensor in the checkpoint's layout -> quantized, with its report. Raises InputError naming the tensor."""
    transposed = is_transposed(name)
    matrix = np.ascontiguousarray(array.T if transposed else array)  # (N, K)
    scheme = SCHEMES[rule.scheme]
    options: dict[str, Any] = {} if rule.block is None else {"block": rule.block}
    if rule.asymmetric:
        options["symmetric"] = False
    if scheme.calibrated:
        options["inputs"] = inputs
    try:
        tensor = replace(scheme(matrix, **options), transposed=transposed)
    except InputError as error:
        raise InputError(f"tensor '{name}': {error}") from error
    stored = (tensor.scheme, None if tensor.per_row else tensor.block)
    damage = relative_error(tensor, matrix)
    sizes = (array.size, array.nbytes, tensor.nbytes)
    return tensor, TensorReport(name, *stored, *sizes, damage, all_zero=not matrix.any())


def float_report(name: str, array: NDArray[np.float32]) -> TensorReport:
    """Of a tensor that stays as it is."""
    return TensorReport(name, FLOAT, None, array.size, array.nbytes, array.nbytes, 0.0, all_zero=not array.any())


def relative_error(tensor: QuantizedTensor, matrix: NDArray[np.float32]) -> float:
    """||matrix - dequantized|| / ||matrix|| (Frobenius) for a matrix [N, K]; 0 for an all-zero one."""
    damage = norm = 0.0
    for start in range(0, len(matrix), ERROR_ROWS):
        rows = slice(start, start + ERROR_ROWS)
        damage += float(np.square(tensor.rows(rows) - matrix[rows], dtype=np.float64).sum())
        norm += float(np.square(matrix[rows], dtype=np.float64).sum())
    return float(np.sqrt(damage / norm)) if norm else 0.0
