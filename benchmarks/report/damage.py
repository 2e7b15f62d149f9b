"""Quantization damage by group or tensor and bits, as an SVG file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.report import svg
from benchmarks.report.svg import Markup, tag
from quant.planning.groups import Group
from quant.planning.plan import Option, Plan
from quant.quantize import TensorReport
from quant.rules import FLOAT
from quant.schemes import SCHEMES

ROW, TOP, LEFT, WIDTH, RIGHT = 18.0, 64.0, 250.0, 900.0, 30.0  # pixels
DELTA = 0  # used instead of bits for a low-rank delta
OTHER = 7  # colour of any other number of bits
COLOURS = {2: 4, 3: 5, 4: 2, 8: 1, 16: 3, DELTA: 6}  # bits of a code -> index of a colour
Dot = tuple[float, float, str, bool]  # (damage, bits per weight, scheme, whether it was chosen)


def picture(reports: Sequence[TensorReport], plan: Plan | None) -> str:
    """A row per group or tensor, with damage on a log scale to the right; the chosen dot is filled."""
    if plan is not None:
        rows = [(str(g), dots(g, o, i)) for g, o, i in zip(plan.groups, plan.options, plan.chosen, strict=True)]
        return chart(rows, "KL of the group alone, nats per token")
    measured = any(r.kl is not None for r in reports)
    rows = [
        (r.name.removesuffix(".weight"), [(r.kl if r.kl is not None else r.relative_error, r.bits, r.scheme, True)])
        for r in reports
        if r.scheme != FLOAT and (r.kl is not None or not measured)
    ]
    return chart(rows, "KL of the tensor alone, nats per token" if measured else "relative error of the tensor")


def dots(group: Group, options: Sequence[Option], chosen: int) -> list[Dot]:
    return [(o.kl, o.bits(group.weights), o.scheme, i == chosen) for i, o in enumerate(options)]


def chart(rows: Sequence[tuple[str, Sequence[Dot]]], what: str) -> str:
    """what: label of the axis."""
    values = [dot[0] for _, own in rows for dot in own if dot[0] > 0] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    powers = range(low, max(high, low + 1) + 1)
    x = svg.Scale(10.0 ** powers[0], 10.0 ** powers[-1], LEFT, WIDTH - RIGHT, log=True)
    height = TOP + ROW * len(rows) + 40
    parts = [tag("text", f"{what} (log scale)", x=LEFT, y=20, font_size=14), *legend()]
    for power in powers:
        at = x(10.0**power)
        parts.append(tag("line", x1=at, x2=at, y1=TOP - 4, y2=height - 30, class_="grid"))
        parts.append(tag("text", f"1e{power}", x=at, y=height - 12, text_anchor="middle", class_="tick"))
    for i, (label, own) in enumerate(rows):
        y = TOP + ROW * (i + 0.5)
        parts.append(tag("text", label, x=LEFT - 10, y=y + 4, text_anchor="end"))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts += [circle(x(max(dot[0], x.low)), y, dot, label) for dot in sorted(own, key=lambda dot: dot[3])]
    return svg.picture_file(f"Damage by group and bits: {what}", WIDTH, height, *parts)


def legend() -> list[Markup]:
    parts = []
    for i, (bits, label) in enumerate(((2, "2 bits"), (3, "3"), (4, "4"), (8, "8"), (16, "16"), (DELTA, "delta"))):
        parts.append(tag("circle", cx=LEFT + 8 + 60 * i, cy=40, r=5, fill=svg.colour(COLOURS[bits])))
        parts.append(tag("text", label, x=LEFT + 18 + 60 * i, y=44))
    return [*parts, tag("text", "filled: chosen; hollow: measured", x=LEFT + 380, y=44)]


def circle(x: float, y: float, dot: Dot, label: str) -> Markup:
    damage, bits, scheme, chosen = dot
    name = scheme.partition(":")[0]
    shade = svg.colour(COLOURS.get(SCHEMES[name].bits, OTHER) if name in SCHEMES else COLOURS[DELTA])
    about = tag("title", f"{label}: {scheme}, {bits:.2f} bits per weight, {damage:.3g}")
    return tag("circle", about, cx=x, cy=y, r=5, fill=shade if chosen else "none", stroke=shade)
