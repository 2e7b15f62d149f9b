"""Quantization report: tables, quantization_report.json and a picture of damage against bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.report.damage import picture
from quant.planning.plan import Plan
from quant.quantize import TensorReport
from quant.rules import FLOAT
from runtime.manifest_file import REPORT_NAME

PICTURE, PLAN = "quantization_report.svg", "plan.json"


def report_files(reports: Sequence[TensorReport], plan: Plan | None) -> dict[str, str]:
    """The report's files by name, to write beside the weights."""
    out = {REPORT_NAME: _json(report_json(reports, plan)), PICTURE: picture(reports, plan)}
    return out if plan is None else out | {PLAN: _json(plan.to_json())}


def report_json(reports: Sequence[TensorReport], plan: Plan | None) -> dict[str, Any]:
    """Totals and one object per tensor; KL in nats per token with only that tensor quantized."""
    weights, before, after = _totals(reports)
    total = {"weights": weights, "bytes_before": before, "bytes_after": after, "bits_per_weight": 8 * after / weights}
    out: dict[str, Any] = {"total": total, "tensors": [vars(r) | {"bits_per_weight": r.bits} for r in reports]}
    return out if plan is None else out | {"plan": plan.to_json()}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def show(reports: Sequence[TensorReport], plan: Plan | None, tensors: bool) -> str:
    """All requested tables, and warnings for the user."""
    parts = [tensor_table(reports)] if tensors else []
    if plan is not None:
        parts.append(plan_table(plan))
    parts.append(table(reports))
    zero = [report.name for report in reports if report.all_zero and report.scheme != FLOAT]
    if zero:
        parts.append(f"all-zero tensors: {', '.join(zero)}")
    return "\n\n".join(parts)


# --- tables -------------------------------------------------------------------------------------------


def table(reports: Sequence[TensorReport]) -> str:
    """One line per storage, those with most weights first, and the total."""
    groups: dict[str, list[TensorReport]] = {}
    for report in reports:
        groups.setdefault(report.scheme + (f" block {report.block}" if report.block else ""), []).append(report)
    ordered = sorted(groups.items(), key=lambda item: -sum(report.weights for report in item[1]))
    measured = any(report.kl is not None for report in reports)
    damage = "worst KL alone" if measured else "worst relative error"
    lines = [("stored as", "tensors", "weights", "bits/weight", "MB before", "MB after", damage)]
    for label, group in ordered:
        lines.append((*_sums(label, group), _worst_kl(group) if measured else _worst_error(group)))
    return _aligned([*lines, (*_sums("total", reports), "")])


def _worst_kl(group: Sequence[TensorReport]) -> str:
    measured = [(report.kl, report.name) for report in group if report.kl is not None]
    return "{:.5f} {}".format(*max(measured)) if measured else ""


def _worst_error(group: Sequence[TensorReport]) -> str:
    worst = max(group, key=lambda report: report.relative_error)
    of_delta = "" if worst.delta_error is None else f", {worst.delta_error:.4f} of its delta"
    return f"{worst.relative_error:.4f} {worst.name}{of_delta}" if worst.relative_error > 0 else ""


def tensor_table(reports: Sequence[TensorReport]) -> str:
    """One line per quantized tensor."""
    lines = [("tensor", "stored as", "bits/weight", "MB", "relative error", "KL alone")]
    for r in reports:
        if r.scheme != FLOAT:
            stored = r.scheme + (f":{r.block}" if r.block else "")
            kl = "" if r.kl is None else f"{r.kl:.5f}"
            lines.append((r.name, stored, f"{r.bits:.2f}", f"{r.bytes_after / 1e6:.3f}", f"{r.relative_error:.4f}", kl))
    return _aligned(lines)


def plan_table(plan: Plan) -> str:
    """One line per group: the chosen scheme, and the damage of each candidate alone."""
    lines = [("group", "weights", "chosen", "MB", "KL alone", "measured: scheme KL")]
    for group, options, i in zip(plan.groups, plan.options, plan.chosen, strict=True):
        all_of_it = "  ".join(f"{option.scheme} {option.kl:.5f}" for option in options)
        size, kl = f"{options[i].bytes / 1e6:.3f}", f"{options[i].kl:.5f}"
        lines.append((str(group), f"{group.weights:,}", options[i].scheme, size, kl, all_of_it))
    return (
        f"{_aligned(lines)}\n"
        f"{plan.bytes / 1e6:.2f} MB, {plan.bits:.2f} bits per weight; KL on the calibration text: "
        f"{plan.measured_kl:.4g} measured, {plan.predicted_kl:.4g} as the sum of its parts (of activations "
        "only int8-dynamic's rounding is in it: other integer kernels add a little, which `dmpt-export eval EXPORT "
        "--base CHECKPOINT` measures)"
    )


def _totals(reports: Sequence[TensorReport]) -> tuple[int, int, int]:
    """Number of weights, bytes before and bytes after."""
    return sum(r.weights for r in reports), sum(r.bytes_before for r in reports), sum(r.bytes_after for r in reports)


def _sums(label: str, group: Sequence[TensorReport]) -> tuple[str, str, str, str, str, str]:
    weights, before, after = _totals(group)
    sizes = (f"{weights:,}", f"{8 * after / weights:.2f}", f"{before / 1e6:.2f}", f"{after / 1e6:.2f}")
    return (label, str(len(group)), *sizes)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Align the first and the last column left, numbers right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for cells in lines:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
        rows.append("  ".join([cells[0].ljust(widths[0]), *numbers, cells[-1]]).rstrip())
    return "\n".join(rows)
