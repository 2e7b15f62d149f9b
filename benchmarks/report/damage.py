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

ROW, TOP, PLOT, RIGHT = 18.0, 84.0, 480.0, 30.0  # pixels
DELTA = 0  # used instead of bits for a low-rank delta
OTHER = 7  # colour of any other number of bits
COLOURS = {2: 4, 3: 5, 4: 2, 8: 1, 16: 3, DELTA: 0}  # bits of a code -> index of a colour
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
    left = 20 + svg.LETTER * max([len(label) for label, _ in rows], default=0)
    width, height = left + PLOT + RIGHT, TOP + ROW * len(rows) + 40
    x = svg.Scale(10.0 ** powers[0], 10.0 ** powers[-1], left, left + PLOT, log=True)
    note = "Filled: chosen; hollow: measured" if any(not dot[3] for _, own in rows for dot in own) else ""
    if any(dot[0] <= 0 for _, own in rows for dot in own):
        note += f"{'; at' if note else 'At'} the left edge: no damage measured"
    parts = [tag("text", f"{what} (log scale)", x=left, y=20, font_size=14), *legend(rows, left)]
    parts.append(tag("text", note, x=left, y=64, class_="tick"))
    for power in powers:
        at = x(10.0**power)
        parts.append(tag("line", x1=at, x2=at, y1=TOP - 4, y2=height - 30, class_="grid"))
        parts.append(tag("text", f"1e{power}", x=at, y=height - 12, text_anchor="middle", class_="tick"))
    for i, (label, own) in enumerate(rows):
        y = TOP + ROW * (i + 0.5)
        parts.append(tag("text", label, x=left - 10, y=y + 4, text_anchor="end"))
        parts.append(tag("line", x1=left, x2=left + PLOT, y1=y, y2=y, class_="grid"))
        parts += [circle(x(max(dot[0], x.low)), y, dot, label) for dot in sorted(own, key=lambda dot: dot[3])]
    return svg.picture_file(f"Damage by group and bits: {what}", width, height, *parts)


def legend(rows: Sequence[tuple[str, Sequence[Dot]]], left: float) -> list[Markup]:
    """The bits that occur, fewest first, deltas last."""
    parts = []
    found = {bits_of(dot[2]) for _, own in rows for dot in own}
    for i, bits in enumerate(sorted(found, key=lambda bits: (bits == DELTA, bits))):
        at = left + 8 + 70 * i
        parts.append(tag("circle", cx=at, cy=40, r=5, fill=svg.colour(COLOURS.get(bits, OTHER))))
        parts.append(tag("text", "delta" if bits == DELTA else f"{bits} bits", x=at + 10, y=44))
    return parts


def bits_of(scheme: str) -> int:
    """Bits of a code; DELTA for a low-rank delta."""
    name = scheme.partition(":")[0]
    return SCHEMES[name].bits if name in SCHEMES else DELTA


def circle(x: float, y: float, dot: Dot, label: str) -> Markup:
    damage, bits, scheme, chosen = dot
    shade = svg.colour(COLOURS.get(bits_of(scheme), OTHER))
    about = tag("title", f"{label}: {scheme}, {bits:.2f} bits per weight, {damage:.3g}")
    return tag("circle", about, cx=x, cy=y, r=5, fill=shade if chosen else "none", stroke=shade)
