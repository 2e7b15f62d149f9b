"""What quantizing did, for people: tables, quantization_report.json and a picture of damage against bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from quant.plan import Group, Option, Plan
from quant.quantize import TensorReport
from quant.rules import FLOAT
from quant.schemes import SCHEMES
from runtime.manifest import REPORT_NAME

PICTURE, PLAN = "quantization_report.svg", "plan.json"


def report_files(reports: Sequence[TensorReport], plan: Plan | None) -> dict[str, str]:
    """The report's files by name, to be written beside the weights."""
    out = {REPORT_NAME: _json(report_json(reports, plan)), PICTURE: picture(reports, plan)}
    return out if plan is None else out | {PLAN: _json(plan.to_json())}


def report_json(reports: Sequence[TensorReport], plan: Plan | None) -> dict[str, Any]:
    """Totals and one object per tensor; KL in nats per token, with that tensor alone quantized."""
    weights, before, after = _totals(reports)
    total = {"weights": weights, "bytes_before": before, "bytes_after": after, "bits_per_weight": 8 * after / weights}
    out: dict[str, Any] = {"total": total, "tensors": [vars(r) | {"bits_per_weight": r.bits} for r in reports]}
    return out if plan is None else out | {"plan": plan.to_json()}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def show(reports: Sequence[TensorReport], plan: Plan | None, tensors: bool) -> str:
    """All tables that were asked for, and what a user should look at."""
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
    """One line for each way of storing, the most weights first, and the total."""
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
    """One line for each quantized tensor."""
    lines = [("tensor", "stored as", "bits/weight", "MB", "relative error", "KL alone")]
    for r in reports:
        if r.scheme != FLOAT:
            stored = r.scheme + (f":{r.block}" if r.block else "")
            kl = "" if r.kl is None else f"{r.kl:.5f}"
            lines.append((r.name, stored, f"{r.bits:.2f}", f"{r.bytes_after / 1e6:.3f}", f"{r.relative_error:.4f}", kl))
    return _aligned(lines)


def plan_table(plan: Plan) -> str:
    """One line for each group: what was chosen, and the damage of every candidate alone."""
    lines = [("group", "weights", "chosen", "MB", "KL alone", "measured: scheme KL")]
    for group, options, i in zip(plan.groups, plan.options, plan.chosen, strict=True):
        all_of_it = "  ".join(f"{option.scheme} {option.kl:.5f}" for option in options)
        size, kl = f"{options[i].bytes / 1e6:.3f}", f"{options[i].kl:.5f}"
        lines.append((str(group), f"{group.weights:,}", options[i].scheme, size, kl, all_of_it))
    return (
        f"{_aligned(lines)}\n"
        f"{plan.bytes / 1e6:.2f} MB, {plan.bits:.2f} bits per weight; KL on the calibration text: "
        f"{plan.measured_kl:.4g} measured, {plan.predicted_kl:.4g} as the sum of its parts (weights alone: kernels "
        "that round activations add to it; `dmpt-export eval EXPORT --base CHECKPOINT` says how much)"
    )


def _totals(reports: Sequence[TensorReport]) -> tuple[int, int, int]:
    """Weights, bytes before and bytes after."""
    return sum(r.weights for r in reports), sum(r.bytes_before for r in reports), sum(r.bytes_after for r in reports)


def _sums(label: str, group: Sequence[TensorReport]) -> tuple[str, str, str, str, str, str]:
    weights, before, after = _totals(group)
    sizes = (f"{weights:,}", f"{8 * after / weights:.2f}", f"{before / 1e6:.2f}", f"{after / 1e6:.2f}")
    return (label, str(len(group)), *sizes)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """The first and the last column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for cells in lines:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
        rows.append("  ".join([cells[0].ljust(widths[0]), *numbers, cells[-1]]).rstrip())
    return "\n".join(rows)


# --- picture ------------------------------------------------------------------------------------------
# Not benchmarks.report.svg, which this package must not import: a file by itself, coloured without a page's styles.

ROW, TOP, LEFT, WIDTH, RIGHT = 18, 64, 250, 900, 30  # pixels
DELTA = 0  # instead of bits: a delta of low rank
# Okabe and Ito's palette for all kinds of colour vision: by the bits of a code.
COLOURS = {DELTA: "#56B4E9", 2: "#CC79A7", 3: "#E69F00", 4: "#D55E00", 8: "#0072B2", 16: "#009E73"}
Dot = tuple[float, float, str, bool]  # (damage, bits per weight, scheme, whether it was chosen)


def picture(reports: Sequence[TensorReport], plan: Plan | None) -> str:
    """An SVG with a row for each group or tensor: damage to the right, on a log scale; the chosen dot is filled."""
    if plan is not None:
        rows = [(str(g), _dots(g, o, i)) for g, o, i in zip(plan.groups, plan.options, plan.chosen, strict=True)]
        what = "KL of the group alone, nats per token"
    else:
        measured = any(r.kl is not None for r in reports)
        what = "KL of the tensor alone, nats per token" if measured else "relative error of the tensor"
        rows = [
            (r.name.removesuffix(".weight"), [(r.kl if r.kl is not None else r.relative_error, r.bits, r.scheme, True)])
            for r in reports
            if r.scheme != FLOAT and (r.kl is not None or not measured)
        ]
    return _chart(rows, what)


def _dots(group: Group, options: Sequence[Option], chosen: int) -> list[Dot]:
    return [(o.kl, o.bits(group.weights), o.scheme, i == chosen) for i, o in enumerate(options)]


def _chart(rows: Sequence[tuple[str, Sequence[Dot]]], what: str) -> str:
    values = [dot[0] for _, dots in rows for dot in dots if dot[0] > 0] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    height = TOP + ROW * len(rows) + 40
    parts = [_head(height, what), *_axis(range(low, high + 1), x, height, what)]
    for i, (label, dots) in enumerate(rows):
        y = TOP + ROW * (i + 0.5)
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:g}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:g}" y2="{y:g}" class="row"/>')
        parts += [_dot(x(dot[0]), y, dot, label) for dot in sorted(dots, key=lambda dot: dot[3])]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _head(height: int, what: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="sans-serif" font-size="12">\n<title>Damage by group and bits: {escape(what)}</title>\n'
        "<style>svg{background:#fff}text{fill:#222}.row{stroke:#eee}.tick{stroke:#ccc}"
        "@media(prefers-color-scheme:dark){svg{background:#1b1b1b}text{fill:#ddd}.row{stroke:#333}.tick{stroke:#555}}"
        "</style>"
    )


def _axis(powers: Sequence[int], x: Callable[[float], float], height: int, what: str) -> list[str]:
    parts = [f'<text x="{LEFT}" y="20" font-size="14">{escape(what)} (log scale)</text>', *_legend()]
    for power in powers:
        at = x(10.0**power)
        parts.append(f'<line x1="{at:g}" x2="{at:g}" y1="{TOP - 4}" y2="{height - 30}" class="tick"/>')
        parts.append(f'<text x="{at:g}" y="{height - 12}" text-anchor="middle">1e{power}</text>')
    return parts


def _legend() -> list[str]:
    parts = []
    for i, (bits, label) in enumerate(((2, "2 bits"), (3, "3"), (4, "4"), (8, "8"), (16, "16"), (DELTA, "delta"))):
        parts.append(f'<circle cx="{LEFT + 8 + 60 * i}" cy="40" r="5" fill="{COLOURS[bits]}"/>')
        parts.append(f'<text x="{LEFT + 18 + 60 * i}" y="44">{label}</text>')
    return [*parts, f'<text x="{LEFT + 380}" y="44">filled: chosen; hollow: measured</text>']


def _dot(x: float, y: float, dot: Dot, label: str) -> str:
    damage, bits, scheme, chosen = dot
    name = scheme.partition(":")[0]
    colour = COLOURS[SCHEMES[name].bits if name in SCHEMES else DELTA]
    fill = colour if chosen else "none"
    told = f"{label}: {scheme}, {bits:.2f} bits per weight, {damage:.3g}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:g}" r="5" fill="{fill}" stroke="{colour}"><title>{escape(told)}</title></circle>'
    )
