"""The files of a quantized folder: a record of each tensor in config.json, its parts in model.safetensors.

A quantized tensor has the parts `<name>.packed`, `<name>.scales` (except fp16) and optionally `<name>.zero_points`.
A head delta has two factors with such parts, `<name>.left` and `<name>.right`. Every other tensor is float32 under its
own name. Users copy, edit and damage folders: anything inconsistent is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from quant.deltas import assemble
from quant.forms.form import Form
from quant.forms.weights import Weight, form_of, quantized
from quant.rules import anchors_of, is_quantizable, is_transposed
from quant.schemes import SCHEMES
from quant.schemes.blockwise import FIELD
from quant.schemes.low_rank import BITS, DELTAS
from training.checkpoints.checkpoint import check_tensors
from training.checkpoints.files import check_readable
from training.errors import InputError
from training.model.config import DMPTConfig

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
FORM = {"scheme": str, "bits": int, "block": int, "shape": list, "transposed": bool}  # fields of every record
AGAIN = "quantize the checkpoint again"


# --- writing ----------------------------------------------------------------------------------------


def records(weights: Mapping[str, Weight]) -> dict[str, dict[str, Any]]:
    """The record of each quantized tensor for config.json."""
    return {name: form.record() for name, form in quantized(weights).items()}


def stored_arrays(weights: Mapping[str, Weight]) -> dict[str, NDArray[Any]]:
    """The arrays of the weights file by their names in it."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, weight in weights.items():
        arrays |= {f"{name}.{part}" if part else name: array for part, array in form_of(weight).parts().items()}
    return arrays


# --- reading ----------------------------------------------------------------------------------------


def read_weights(folder: Path, config: DMPTConfig) -> dict[str, Weight]:
    """All tensors by name. Raises InputError when one is missing, damaged or inconsistent.

    config: as read from the folder, with its `quantization`.
    """
    stored = read_arrays(folder / WEIGHTS)
    known = read_records(config.quantization, folder)
    deltas = {name: entry for name, entry in known.items() if entry["scheme"] in DELTAS}
    weights: dict[str, Weight] = {}
    try:
        for name in known:
            if name not in deltas:
                weights[name] = _put_together(stored, name, known[name])
        weights |= assemble(stored, deltas, stored | weights)
    except InputError as error:
        raise InputError(f"{folder / WEIGHTS}: {error}: copy or quantize it again") from error
    weights = {name: weights[name] for name in known}
    twice = sorted(weights.keys() & stored.keys())
    if twice:
        raise InputError(f"{folder / WEIGHTS} holds {', '.join(twice)} both quantized and float: quantize it again")
    weights |= stored  # the rest is float
    wrong = [name for name, array in stored.items() if array.dtype != np.float32]
    if wrong:
        raise InputError(f"{folder / WEIGHTS} holds {', '.join(wrong)}, neither float32 nor quantized in config.json")
    check_tensors(config, {name: checkpoint_shape(weight) for name, weight in weights.items()}, folder)
    anchors = anchors_of(config)
    for name, weight in weights.items():
        anchor = getattr(weight, "anchor_name", None)
        if anchor is not None and anchors.get(name) != {anchor}:
            raise InputError(f"{folder}: {name} is a delta to {anchor}, which is not the anchor of its leaf")
    return weights


def read_records(quantization: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """The record of every quantized tensor in config.json, checked."""
    where = f"{folder / 'config.json'}: quantization"
    if not isinstance(quantization, dict) or not isinstance(quantization.get("tensors"), dict):
        raise InputError(f"{where} has no table of tensors: {AGAIN}")
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{where} has format {version}, this program reads {FORMAT_VERSION}: update one of them")
    known: dict[str, dict[str, Any]] = quantization["tensors"]
    for name, entry in known.items():
        if problem := wrong_with(name, entry):
            raise InputError(f"{where} of {name} {problem}: {AGAIN}")
    return known


def bits_of(scheme: str) -> int | None:
    """Stored bits of a code; None for an unknown scheme."""
    if scheme in DELTAS:
        return BITS
    return FIELD.get(SCHEMES[scheme].bits, SCHEMES[scheme].bits) if scheme in SCHEMES else None


def wrong_with(name: str, entry: Any) -> str | None:
    """What is wrong with a tensor's record; None if nothing."""
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in FORM.items()):
        return f"must give {', '.join(FORM)}"
    scheme, bits, shape, transposed = (entry[key] for key in ("scheme", "bits", "shape", "transposed"))
    stored_bits = bits_of(scheme)
    if stored_bits is None:
        return f"names an unknown scheme '{scheme}'"
    if bits != stored_bits:
        return f"gives {bits} bits, but {scheme} is stored in {stored_bits}"
    if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
        return f"has shape {shape}, not two sizes above 0"
    if not is_quantizable(name):
        return "belongs to a tensor that always stays float32"
    if transposed != is_transposed(name):
        return f"gives transposed {transposed}, but this matrix is always stored the other way"
    return None


def checkpoint_shape(weight: Weight) -> tuple[int, ...]:
    """A weight's shape in the float checkpoint."""
    form = form_of(weight)
    return form.shape[::-1] if form.transposed else form.shape


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of a safetensors file. Raises InputError when it is missing, damaged or not finite."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        check_readable(path)
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (the file is not a mapping)
                arrays[name] = file.get_tensor(name)
                if not np.isfinite(arrays[name]).all():
                    raise InputError(f"{path}: '{name}' holds NaN or infinite values: {AGAIN}")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {AGAIN}") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error}): copy or quantize it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return arrays


def _put_together(stored: dict[str, NDArray[Any]], name: str, record: dict[str, Any]) -> Form:
    """Take a tensor's parts out of `stored` and assemble it."""
    form = SCHEMES[record["scheme"]].form
    parts = {part: stored.pop(f"{name}.{part}") for part in form.PARTS if f"{name}.{part}" in stored}
    if missing := [f"{name}.{part}" for part in form.NEEDED if part not in parts]:
        raise InputError(f"{' or '.join(missing)} is missing")
    try:
        return form.assemble(parts, record)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
