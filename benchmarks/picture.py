"""The comparison as a picture: size against perplexity, speed as marker area."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from benchmarks.report.frontier import colour_numbers
from benchmarks.report.placing import Box, best_spot, distance
from benchmarks.row import Row, merit

WIDTH, HEIGHT, DPI = 1200, 800, 100  # pixels
# Okabe and Ito's palette for all kinds of colour vision, by the numbers of report.frontier: those of well-known
# families, then the others', in turn.
COLOURS, MORE_COLOURS = ("#6b6b6b", "#0072B2", "#D55E00"), ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, PALE = "#222222", "#dddddd"
LARGEST, SMALLEST = 1500.0, 30.0  # marker areas in points^2
LABEL_SIZE = 13  # points
HALO = [withStroke(linewidth=3, foreground="white")]  # keeps a label readable where a line passes under it


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of 1200x800 pixels; rows without quality are left out."""
    quality = merit(rows)
    rows = [row for row in rows if row.figure(quality) is not None]
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.09, 0.89, 0.72))
    colour = colours([row.family for row in rows])
    scale = area_scale(rows)
    for family, members in grouped(rows).items():
        members.sort(key=lambda row: row.size_bytes)
        points = [point(row, quality) for row in members]
        axes.plot(*zip(*points, strict=True), color=colour[family], linewidth=1, alpha=0.5, zorder=1)
    for row in sorted(rows, key=lambda row: -area(row, scale)):  # small markers on top of large ones
        # White edges keep markers apart that overlap; a model without a speed is a hollow ring.
        fill, edge = (colour[row.family], "white") if row.speed else ("white", colour[row.family])
        axes.scatter(
            *point(row, quality), s=area(row, scale), color=fill, edgecolors=edge, linewidths=1.5, alpha=0.9, zorder=2
        )
    dress(axes, [point(row, quality) for row in rows], quality)
    legends(figure, rows, colour, scale)
    place_labels(figure, axes, rows, colour, scale, quality)
    figure.savefig(path, metadata={"Software": "dmpt-export"})


def point(row: Row, quality: str) -> tuple[float, float]:
    """MB and how well it predicts, one of benchmarks.row.FIGURES."""
    value = row.figure(quality)
    assert value is not None
    return row.size_bytes / 1e6, value


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    return families


def colours(families: Sequence[str]) -> dict[str, str]:
    """Family -> colour, as in the report's figure."""
    more = itertools.islice(itertools.cycle(MORE_COLOURS), len(families))
    palette = [*COLOURS, *more]
    return {family: palette[i] for family, i in colour_numbers(families).items()}


def area_scale(rows: Sequence[Row]) -> float:
    """Marker area in points^2 per token/s; areas start at zero, so twice the area is twice the speed."""
    return LARGEST / max((speed for row in rows if (speed := row.decode_tokens_per_s)), default=1.0)


def area(row: Row, scale: float) -> float:
    speed = row.decode_tokens_per_s
    return max(SMALLEST, scale * speed) if speed else 4 * SMALLEST


# --- axes and legends -------------------------------------------------------------------------------


def dress(axes: Any, points: Sequence[tuple[float, float]], quality: str) -> None:
    """Limits with room for markers and labels, plain numbers on both axes."""
    sizes, values = zip(*points, strict=True)
    axes.set_xscale("log")
    room = max(0.12 * math.log(max(sizes) / min(sizes)), 0.15)
    axes.set_xlim(min(sizes) / math.exp(room), max(sizes) * math.exp(room))
    low, high = min(values), max(values)
    if high > 3 * low:
        axes.set_yscale("log")
        room = 0.12 * math.log(high / low)
        axes.set_ylim(low / math.exp(room), high * math.exp(room))
        log_ticks(axes.yaxis)
    else:
        room = max(0.12 * (high - low), 0.01 * high)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(8))
    log_ticks(axes.xaxis)
    axes.set_xlabel("file size (MB, log scale)", fontsize=13, color=INK)
    axes.set_ylabel(quality, fontsize=13, color=INK)
    axes.tick_params(labelsize=12, colors=INK, length=3)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def log_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10, ... in plain numbers; finer ones where these would be fewer than three."""
    low, high = axis.get_view_interval()
    steps = next((s for s in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)) if ticks_within(s, low, high) >= 3), range(1, 10))
    axis.set_major_locator(LogLocator(subs=steps, numticks=99))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def ticks_within(steps: Sequence[float], low: float, high: float) -> int:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return sum(low <= step * 10**decade <= high for decade in decades for step in steps)


def legends(figure: Any, rows: Sequence[Row], colour: dict[str, str], scale: float) -> None:
    """Title, families by colour and speeds by area, in a band above the axes where they can hide nothing."""
    figure.text(0.08, 0.955, "Size, quality and speed", fontsize=18, fontweight="bold", color=INK, va="center")
    figure.text(0.97, 0.955, "better: lower and further left", fontsize=13, color=INK, va="center", ha="right")

    def mark(size: float, fill: str, edge: str, text: str) -> Any:
        return figure.axes[0].scatter([], [], s=size, color=fill, edgecolors=edge, label=text)

    style = {"frameon": False, "fontsize": 13, "labelcolor": INK, "borderaxespad": 0, "borderpad": 0}
    families = [mark(150, shade, "white", family) for family, shade in colour.items()]
    figure.legend(handles=families, loc="center left", bbox_to_anchor=(0.072, 0.855), ncols=4, handletextpad=0.3,
                  columnspacing=1.2, **style)  # fmt: skip
    speeds = [speed for row in rows if (speed := row.decode_tokens_per_s)]
    marks = [mark(scale * value, "#bbbbbb", "white", f"{value:g}") for value in round_speeds(speeds)]
    if len(speeds) < len(rows):
        marks.append(mark(4 * SMALLEST, "white", "#888888", "not timed"))
    figure.legend(handles=marks, loc="center right", bbox_to_anchor=(0.97, 0.855), ncols=4, handletextpad=0.9,
                  columnspacing=1.6, **style)  # fmt: skip
    if speeds:
        figure.text(0.97, 0.91, "marker area: decode tokens/s", fontsize=13, color=INK, va="center", ha="right")


def round_speeds(speeds: Sequence[float]) -> list[float]:
    """Up to three round numbers that span the speeds, each at most the greatest of them.

    >>> round_speeds([38.0, 150.0, 248.0]), round_speeds([])
    ([50, 100, 200], [])
    """
    if not speeds:
        return []
    top = 10 ** math.floor(math.log10(max(speeds)))
    top *= next(step for step in (5, 2, 1) if step * top <= max(speeds))
    values = [top / 4, top / 2, top]
    return [int(v) if v == int(v) else v for v in values]


# --- labels -----------------------------------------------------------------------------------------


def place_labels(
    figure: Any, axes: Any, rows: Sequence[Row], colour: dict[str, str], scale: float, quality: str
) -> tuple[list[Box], list[Box]]:
    """Each marker's scheme beside it, at the nearest place that covers no marker and no other label.

    Returns the boxes of the labels and of the markers, in pixels.
    """
    renderer = figure.canvas.get_renderer()
    edges = axes.get_window_extent(renderer)
    frame = Box(edges.x0, edges.y0, edges.x1, edges.y1)
    centres = [axes.transData.transform(point(row, quality)) for row in rows]
    radii = [math.sqrt(area(row, scale)) / 2 * DPI / 72 for row in rows]  # pixels
    markers = [Box.around(x, y, 2 * r, 2 * r) for (x, y), r in zip(centres, radii, strict=True)]
    taken: list[Box] = []
    for row, centre, radius in zip(rows, centres, radii, strict=True):
        text = figure.text(0, 0, label(row, rows), fontsize=LABEL_SIZE, fontweight="bold", color=colour[row.family],
                           ha="center", va="center", zorder=4, path_effects=HALO)  # fmt: skip
        extent = text.get_window_extent(renderer)
        spot = best_spot(centre, radius, extent.width + 6, extent.height + 4, frame, [*markers, *taken])
        x, y = spot.centre
        text.set_position(figure.transFigure.inverted().transform((x, y)))
        taken.append(spot)
        if distance(centre, spot) - radius > 24:  # far enough to need a line to its marker
            inverse = axes.transData.inverted().transform
            ends = zip(inverse(centre), inverse((x, y)), strict=True)
            axes.plot(*ends, color=colour[row.family], linewidth=0.8, alpha=0.7, zorder=1.5)
    return taken, markers


def label(row: Row, rows: Sequence[Row]) -> str:
    """The scheme, or the name where a family has several models in one scheme."""
    same = [other for other in rows if (other.family, other.scheme) == (row.family, row.scheme)]
    return row.scheme if len(same) == 1 else row.name
