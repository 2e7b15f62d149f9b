"""Quantize a checkpoint by a plan: measure, choose, verify as a whole, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.calibration import Calibration
from quant.checkpoint import PLANNED, balance, check_unquantized, note_of, write_quantized
from quant.forms.weights import Weight
from quant.planning.damage_table import Measurements
from quant.planning.groups import CANDIDATES, candidates_of, check_candidates, groups_of
from quant.planning.plan import Plan, Target, make_plan
from quant.planning.ways_out import ways_out
from quant.quantize import TensorReport, float_report
from quant.rules import DYNAMIC, anchors_of
from training.checkpoints.checkpoint import load_state
from training.checkpoints.folder import Source
from training.checkpoints.places import check_replaceable
from training.errors import InputError

MOST_PARTS = 4  # arrays stored for one tensor: the two factors of a delta, each with scales
Files = Callable[[Sequence[TensorReport], Plan | None], Mapping[str, str]]  # further files of the folder, by name


def save_planned(
    source: Source,
    out: Source | None,
    target: Target,
    calibration: Calibration,
    cache: Path,
    candidates: str = CANDIDATES,
    files: Files = lambda reports, plan: {},
    smooth: float | None = None,
) -> tuple[Plan, list[TensorReport]]:
    """Quantize `source` into the folder `out` by the plan with least damage under `target`; without `out`, only plan.

    cache: folder for measured damages. smooth: balance activations first (quant.smooth), where int8-dynamic is a
    candidate. Raises InputError for an unusable or already quantized source, a target that
    no plan reaches (with the least possible one), unknown candidates, or an unusable `out`.
    """
    if out is not None:
        check_replaceable(Path(out), "quantized")
    folder = check_unquantized(source)
    check_candidates(candidates)
    config, arrays = load_state(folder)
    groups = groups_of({name: array.shape for name, array in arrays.items()}, anchors_of(config))
    schemes = [candidates_of(group, candidates) for group in groups]
    balanced: tuple[str, ...] = ()
    if smooth is not None:
        dynamic = [group for group, own in zip(groups, schemes, strict=True) if DYNAMIC in own]
        balanced = tuple(name for group in dynamic for name in group.tensors)
        arrays = balance(config, arrays, balanced, calibration, smooth)
    grouped = {name for group in groups for name in group.tensors}
    sizes = (
        sum(array.nbytes for name, array in arrays.items() if name not in grouped),
        sum(array.size for array in arrays.values()),
        header_bytes([*arrays, *(MOST_PARTS - 1) * [*grouped]]),
    )
    measured = Measurements(config, arrays, calibration, cache)
    options = measured.options(groups, schemes)
    plan = make_plan(
        groups, options, target, sizes,
        lambda chosen: measured.joint(groups, [schemes[g][i] for g, i in enumerate(chosen)]),
        lambda size, least: ways_out(groups, {name: array.shape for name, array in arrays.items()}, size, least),
    )  # fmt: skip
    plan = replace(plan, calibration=calibration.as_dict(), smooth=smooth, balanced=balanced)
    quantized = measured.quantized(groups, plan.schemes())
    weights: dict[str, Weight] = {
        name: quantized[name][0] if name in quantized else array for name, array in arrays.items()
    }
    reports = [quantized[name][1] if name in quantized else float_report(name, array) for name, array in arrays.items()]
    if plan.bytes != sum(report.bytes_after for report in reports):
        raise InputError(f"the damages cached in {measured.path} belong to different tensors: delete that file")
    if out is not None:
        recorded: dict[str, Any] = {
            "rules": [rule.as_dict() for rule in plan.rules()],
            "calibration": calibration.as_dict(),
        }
        recorded |= {} if smooth is None else {"smooth": smooth}
        write_quantized(
            out, config, weights, PLANNED, recorded, folder,
            note_of(source, f"`dmpt-export quantize`, planned for {target},", reports), files(reports, plan), folder,
        )  # fmt: skip
    return plan, reports


def header_bytes(names: Iterable[str]) -> int:
    """Upper bound on the header of a safetensors file whose arrays have these names plus a part suffix.

    Source: github.com/huggingface/safetensors, "Format".
    """
    longest = len('"":{"dtype":"F32","shape":[,,],"data_offsets":[,]},.zero_points') + 4 * len(str(2**31))
    return 64 + sum(len(name) + longest for name in names)
