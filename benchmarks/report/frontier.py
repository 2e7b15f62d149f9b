"""Plot of size against perplexity, with speed as marker area and a line along the best trade-offs (Pareto front)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.comparison.model_result import Row, cells, merit
from benchmarks.comparison.ranking import front
from benchmarks.report import svg
from benchmarks.report.placing import Box, best_spot, distance

WIDTH, HEIGHT = NARROW = 460.0, 400.0  # of the file, and of a page on a phone
WIDE = 880.0, 400.0  # of a page on a desktop
LARGEST, SMALLEST, RING = 20.0, 4.0, 5.0  # radii
KNOWN = {"GPT-2": 0, "GPT-2 base": 0, "GPT-2 fine-tuned": 1, "DMPT": 2}  # family -> colour
NAMED = 9  # with more models than this the markers have numbers
LONGEST = 20  # characters of a label


def colour_numbers(families: Sequence[str]) -> dict[str, int]:
    """Family -> colour: its own from KNOWN if no earlier family took it, else one from 3 on."""
    out: dict[str, int] = {}
    for family in dict.fromkeys(families):
        own = KNOWN.get(family)
        out[family] = own if own is not None and own not in out.values() else max([2, *out.values()]) + 1
    return out


@dataclass(frozen=True)
class Drawing:
    """The drawing of a table of models."""

    name: str  # accessible name
    parts: list[svg.Markup]
    families: list[tuple[str, int]]  # each with the index of its colour
    note: str


def draw(rows: Sequence[Row]) -> svg.Markup:
    """The figure and its legend for a page; empty if no model has a quality."""
    if not (drawing := drawn(rows)):
        return svg.Markup()

    def at_size(width: float, height: float, class_: str) -> svg.Markup:
        again = drawn(rows, width, height)
        assert again is not None
        return svg.picture(again.name, width, height, *again.parts, class_=class_)

    figure = svg.sized(at_size, NARROW, WIDE)
    key = svg.legend([family for family, _ in drawing.families], [index for _, index in drawing.families])
    return svg.tag("figure", key, figure, svg.tag("figcaption", drawing.note), aria_label=title(rows))


def draw_file(rows: Sequence[Row]) -> str:
    """The same as a separate SVG file. At least one row must have a quality."""
    drawing = drawn(rows)
    assert drawing is not None
    key, height = svg.legend_rows(drawing.families, WIDTH)
    top = 26 + height
    heading = svg.tag("text", title(rows), x=4, y=18, font_size=15, font_weight="bold")
    lines = [line.strip(" .") for line in drawing.note.split(". ")]
    notes = [svg.tag("text", line, x=4, y=top + HEIGHT + 14 * i, class_="tick") for i, line in enumerate(lines, 1)]
    body = [heading, svg.tag("g", key, transform="translate(0,26)")]
    body.append(svg.tag("g", *drawing.parts, transform=f"translate(0,{svg.number(top)})"))
    return svg.picture_file(drawing.name, WIDTH, top + HEIGHT + 14 * len(lines) + 8, *body, *notes)


def title(rows: Sequence[Row]) -> str:
    return f"Size, {merit(rows)} and speed"


def drawn(rows: Sequence[Row], width: float = WIDTH, height: float = HEIGHT) -> Drawing | None:
    """Rows are numbered from 1 as in the table; rows without quality are left out."""
    quality = merit(rows)
    numbered = [(str(i), row) for i, row in enumerate(rows, 1) if row.figure(quality) is not None]
    shown = [row for _, row in numbered]
    if not shown:
        return None
    x = svg.Scale.around([row.size_bytes / 1e6 for row in shown], 50, width - 16, log=True)
    merits = {row.name: value for row in shown if (value := row.figure(quality)) is not None}
    far = max(merits.values()) > 3 * min(merits.values())
    y = svg.Scale.around([*merits.values()], height - 46, 28, log=far)
    colours = colour_numbers([row.family for row in rows])
    best = max((row.decode_tokens_per_s or 0.0 for row in shown), default=0.0) or 1.0
    parts = [svg.axes(x, y, "file size, MB (log scale)", f"{quality}{' (log scale)' if far else ''}")]
    best_of_all = set(front(shown, timed=False))
    ahead = sorted((row.size_bytes / 1e6, merits[row.name]) for row in shown if row.name in best_of_all)
    points = [(x(a), y(b)) for a, b in ahead]
    path = " ".join(f"{svg.number(a)},{svg.number(b)}" for a, b in points)
    parts.append(svg.tag("polyline", points=path, fill="none", class_="front"))
    centres = {row.name: (x(row.size_bytes / 1e6), y(merits[row.name])) for row in shown}
    radii = {row.name: radius(row, best) for row in shown}
    on_top = sorted(shown, key=lambda row: -radii[row.name])  # small markers over large ones
    parts += [
        marker(row, centres[row.name], radii[row.name], colours[row.family], said(row, quality)) for row in on_top
    ]
    frame = Box(x.start, y.end, x.end, y.start)
    parts += labels(numbered, centres, radii, frame, colours, along(points))
    name = f"Size, {quality} and speed: " + "; ".join(said(row, quality) for row in shown)
    note = (
        "Better: lower, further left, larger. Marker area: decode tokens/s; hollow: not timed. "
        f"Dashed line: best trade-offs of size and {quality}."
    )
    used = [(family, index) for family, index in colours.items() if any(row.family == family for row in shown)]
    return Drawing(name, parts, used, note)


def radius(row: Row, best: float) -> float:
    speed = row.decode_tokens_per_s
    return max(SMALLEST, LARGEST * math.sqrt(speed / best)) if speed else RING


def said(row: Row, quality: str) -> str:
    speed = f", {row.decode_tokens_per_s:.0f} tokens/s" if row.decode_tokens_per_s else ""
    return f"{row.name}: {row.size_bytes / 1e6:.3g} MB, {quality} {cells(row)[quality]}{speed}"


def marker(row: Row, centre: tuple[float, float], size: float, index: int, title: str) -> svg.Markup:
    ring = (
        {"fill": "none", "stroke_width": 2} if row.speed is None else {"fill": svg.colour(index), "fill_opacity": 0.9}
    )
    stroke = svg.colour(index) if row.speed is None else "var(--paper)"
    return svg.tag("circle", svg.tag("title", title), cx=centre[0], cy=centre[1], r=size, stroke=stroke, **ring)


def along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes along the lines between the points, which labels avoid."""
    out = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6))
        out += [Box.around(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, 4, 4) for i in range(steps)]
    return out


def label(row: Row, rows: Sequence[Row]) -> str:
    """The scheme, since the colour shows the family; the name if a family has several models in one scheme."""
    same = [other for other in rows if (other.family, other.scheme) == (row.family, row.scheme)]
    return row.scheme if len(same) == 1 else row.name


def labels(
    numbered: Sequence[tuple[str, Row]],
    centres: dict[str, tuple[float, float]],
    radii: dict[str, float],
    frame: Box,
    colours: dict[str, int],
    line_boxes: Sequence[Box],
) -> list[svg.Markup]:
    """Labels: schemes or names, or numbers if there are many; with a line to the marker if the label is far away."""
    boxes = [Box.around(*centres[row.name], 2 * radii[row.name], 2 * radii[row.name]) for _, row in numbered]
    parts: list[svg.Markup] = []
    taken = [*boxes, *line_boxes]
    for text, row in numbered:
        if len(numbered) <= NAMED:
            text = label(row, [other for _, other in numbered])
            text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        centre = centres[row.name]
        spot = best_spot(centre, radii[row.name], svg.LETTER * len(text) + 6, svg.FONT + 4, frame, taken)
        taken.append(spot)
        (at, middle), shade = spot.centre, svg.colour(colours[row.family])
        if distance(centre, spot) - radii[row.name] > 20:
            line = {"x1": centre[0], "y1": centre[1], "x2": at, "y2": middle}
            parts.append(svg.tag("line", **line, stroke=shade, stroke_opacity=0.6))
        parts.append(svg.tag("text", text, x=at, y=middle + 4, text_anchor="middle", class_="label"))
    return parts
