"""Read and write the quantized checkpoint folder, and quantize a float checkpoint into one by rules.

config.json records how each tensor is stored, model.safetensors holds the bytes (see quant.folder). The export copies
these bytes unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quant.calibration import Calibration, Inputs, observe
from quant.folder import FORMAT_VERSION, WEIGHTS, read_weights, records, stored_arrays
from quant.forms.weights import Weight, form_of
from quant.planning.damage_table import with_damage
from quant.quantize import TensorReport, quantize_tensors
from quant.rules import (
    DYNAMIC,
    FLOAT,
    Rule,
    anchors_of,
    assign,
    check_text,
    default_rules,
    is_quantizable,
    parse_scheme,
)
from quant.schemes import SCHEMES, check_installed
from quant.smooth import FOLDED, Arrays
from quant.smooth import smooth as smoothed
from training.checkpoints.atomic import atomic_folder
from training.checkpoints.card import scheme_tags
from training.checkpoints.checkpoint import (
    config_fields,
    copy_tokenizer,
    load_state,
    model_card,
    model_from_tensors,
    read_config,
    write_json,
)
from training.checkpoints.files import resolve
from training.checkpoints.folder import Source
from training.checkpoints.places import check_replaceable
from training.checkpoints.tensors import write_tensors
from training.errors import FieldError, InputError
from training.model.config import DMPTConfig
from training.model.generation import DMPTForCausalLM

PLANNED = "planned"  # scheme name of a folder whose tensors follow a plan's rules


def load_weights(source: Source) -> tuple[DMPTConfig, dict[str, Weight]]:
    """Configuration and weights by tensor name, of a quantized or a float checkpoint.

    A tied heads.0 is absent. Raises InputError as training.checkpoints.checkpoint.read_checkpoint does, and for a
    quantized folder whose parts do not fit together.
    """
    folder = resolve(source)
    config = read_config(folder)
    if not is_quantized(config):
        _, arrays = load_state(folder)
        return config, dict(arrays)
    weights = read_weights(folder, config)
    del config.quantization  # each tensor carries its own record; the configuration is again the float model's
    return config, weights


def dequantized_model(source: Source) -> DMPTForCausalLM:
    """The torch reference: the model with dequantized float32 weights, in eval mode (float checkpoints unchanged)."""
    config, weights = load_weights(source)
    tensors = {}
    for name, weight in weights.items():
        tensors[name] = torch.from_numpy(form_of(weight).dequantize())
    return model_from_tensors(config, tensors)


def save_quantized(
    source: Source,
    out: Source | None,
    scheme: str | None,
    rules: Sequence[Rule] = (),
    *,
    calibration: Calibration | None = None,
    smooth: float | None = None,
    balanced: Collection[str] | None = None,
    files: Callable[[Sequence[TensorReport]], Mapping[str, str]] = lambda reports: {},
    vocabulary: str | None = None,
) -> list[TensorReport]:
    """Quantize a DMPT or GPT-2 folder (or hub id) into the folder `out`, atomically; returns a report per tensor.

    Without `out` nothing is written; without a `scheme` tensors that no rule matches stay float32.

    `scheme` is SCHEME[:BLOCK][:asymmetric] as in a rule: "int4:64" sets the block. `rules` come before the scheme's own
    (quant.rules). `calibration` text is used by calibrated schemes, by balancing, and to measure the damage of each
    tensor. `smooth`: balance activations first (quant.smooth) against the weights in `balanced`, or those that get
    int8-dynamic. `files`: further text files to write beside the weights, by name. `vocabulary`: scheme of the
    embedding and the heads; None: as quant.rules.default_rules chooses.
    Raises InputError for an unusable or already quantized source, an impossible rule, a scheme that lacks its
    calibration, or an `out` that is not a quantized folder; nothing is left behind then.
    """
    if out is not None:
        check_replaceable(Path(out), "quantized")
    name = None if scheme is None else parse_scheme(scheme)[0]
    defaults = [] if scheme is None else default_rules(*parse_scheme(scheme), vocabulary)
    folder = check_unquantized(source)
    config, arrays = load_state(folder)
    shapes = {name: array.shape for name, array in arrays.items()}
    anchors = anchors_of(config)
    plan = assign(shapes, rules, defaults, config.tie_word_embeddings, anchors)
    check_installed(rule.scheme for rule in plan.values())
    if not plan:
        raise InputError(f"no tensor of {folder} would be quantized: remove the rules that keep all of them {FLOAT}")
    if scheme is None:
        check_complete(shapes, plan, rules)
    check_text(plan, calibration is not None, smooth if balanced is None else None)
    recorded: dict[str, Any] = {"rules": [rule.as_dict() for rule in [*rules, *defaults]]}
    if calibration is not None:
        recorded["calibration"] = calibration.as_dict()
    if smooth is not None and calibration is not None:
        dynamic = {name for name, rule in plan.items() if rule.scheme == DYNAMIC}
        arrays = balance(config, arrays, dynamic if balanced is None else balanced, calibration, smooth)
        recorded["smooth"] = smooth
    observed = observed_inputs(config, arrays, plan, calibration)
    weights, reports = quantize_tensors(dict(arrays) if calibration else arrays, plan, observed, anchors)
    if calibration is not None:
        reports = with_damage(_model(config, arrays), weights, reports, calibration)
    if out is not None:
        note = note_of(source, f"`dmpt-export quantize --scheme {name}`" if name else "a plan's rules", reports)
        write_quantized(out, config, weights, name or PLANNED, recorded, folder, note, files(reports), folder)
    return reports


def check_complete(shapes: Mapping[str, Sequence[int]], plan: Mapping[str, Rule], rules: Sequence[Rule]) -> None:
    """Raise InputError when a plan's rules miss a matrix: the plan was made for a different model."""
    left = [name for name in shapes if is_quantizable(name) and name not in plan]
    if left and not any(rule.scheme == FLOAT for rule in rules):
        raise FieldError(
            "the plan has no rule for {}{}: it was made for a different model; give {scheme} for the rest, or make a "
            "new plan",
            ", ".join(left[:5]), " and more" if len(left) > 5 else "",
        )  # fmt: skip


def observed_inputs(
    config: DMPTConfig, arrays: Arrays, plan: Mapping[str, Rule], calibration: Calibration | None
) -> Iterator[dict[str, Inputs]]:
    """Inputs of the tensors with calibrated schemes, for quantize_tensors."""
    wanted = {name for name, rule in plan.items() if rule.scheme in SCHEMES and SCHEMES[rule.scheme].calibrated}
    if not wanted or calibration is None:
        return iter(())
    return observe(_model(config, arrays), calibration.windows, wanted)


def balance(
    config: DMPTConfig, arrays: Arrays, names: Collection[str], calibration: Calibration, alpha: float
) -> Arrays:
    """The tensors, with those of the named weights that can be balanced against their inputs: the float model stays the
    same."""
    largest: dict[str, NDArray[np.float32]] = {}
    possible = {name for name in names if name.removesuffix(".weight").endswith(FOLDED)}
    for inputs in observe(_model(config, arrays), calibration.windows, possible):
        largest |= {name: seen.largest for name, seen in inputs.items()}
    return smoothed(arrays, largest, alpha)


def _model(config: DMPTConfig, arrays: Arrays) -> DMPTForCausalLM:
    """The float model around the arrays, without copying them."""
    return model_from_tensors(config, {name: torch.from_numpy(array) for name, array in arrays.items()})


def write_quantized(
    out: Source,
    config: DMPTConfig,
    weights: Mapping[str, Weight],
    scheme: str,
    recorded: Mapping[str, Any],
    tokenizer_from: Source | None = None,
    note: str | None = None,
    files: Mapping[str, str] = MappingProxyType({}),
    source: Source | None = None,
) -> None:
    """Write a quantized folder atomically; `load_weights` returns the same bits.

    `scheme` and `recorded` (rules, calibration) record the request; `note` goes into the model card, with what the
    card of `source` states of license and the like. Raises InputError when `out` holds anything but a quantized
    checkpoint.
    """
    quantization = {
        "scheme": scheme,
        "format_version": FORMAT_VERSION,
        **recorded,
        "tensors": records(weights),
    }
    with atomic_folder(out, "quantized") as tmp:
        # safetensors writes raw memory: a strided view would be stored scrambled
        arrays = {name: np.ascontiguousarray(array) for name, array in stored_arrays(weights).items()}
        write_tensors(tmp / WEIGHTS, {name: torch.from_numpy(array) for name, array in arrays.items()})
        write_json(tmp / "config.json", config_fields(config) | {"quantization": quantization})
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, tmp, config)
        card = {"README.md": model_card(config, Path(out).resolve().name, note, source, *scheme_tags(scheme))}
        for name, text in (card | dict(files)).items():
            (tmp / name).write_text(text, encoding="utf-8")


def note_of(source: Source, how: str, reports: Sequence[TensorReport]) -> str:
    """The model card's line on where the weights come from."""
    name = Path(source).resolve().name if Path(source).is_dir() else str(source)  # a hub id stays unchanged
    quantized = [report for report in reports if report.scheme != FLOAT]
    before, after = (sum(getattr(r, f"bytes_{when}") for r in reports) / 1e6 for when in ("before", "after"))
    return (
        f"Quantized with {how} from `{name}`: {len(quantized)} of {len(reports)} "
        f"tensors, {before:.1f} MB to {after:.1f} MB. config.json records the scheme, bits and block of each."
    )


def check_unquantized(source: Source) -> Path:
    """The folder of a float checkpoint. Raises InputError for a quantized one."""
    folder = resolve(source)
    if is_quantized(read_config(folder)):
        raise InputError(f"{folder} is already quantized: give its float checkpoint")
    return folder


def is_quantized(config: DMPTConfig) -> bool:
    """Whether a configuration read from disk belongs to a quantized folder."""
    return getattr(config, "quantization", None) is not None
