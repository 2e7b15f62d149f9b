"""Small plot functions: SVG as text, coloured by the page's CSS variables to follow the light or dark setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.report.theme import COLOURS, FIGURES, LIGHT

FONT = 12.0  # pixels, of all text in figures
LETTER = 0.56 * FONT  # approximate width of a character
PALETTE = len(LIGHT)  # colours --c0 ... of benchmarks.report.theme


class Markup(str):
    """Text that is already markup; any other text is escaped."""


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; in attribute names "_" stands for "-" and a final "_" is dropped.

    >>> tag("text", "a<b", x=1.25, text_anchor="end", class_="k")
    '<text x="1.25" text-anchor="end" class="k">a&lt;b</text>'
    """
    parts = [f' {key.rstrip("_").replace("_", "-")}="{escape(number(v))}"' for key, v in attributes.items()]
    return Markup(f"<{name}{''.join(parts)}>{together(*children)}</{name}>")


def together(*children: str) -> Markup:
    """
    >>> together(tag("b"), "<i>")
    '<b></b>&lt;i&gt;'
    """
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def colour(index: int) -> str:
    return f"var(--c{index % PALETTE})"


def picture(name: str, width: float, height: float, *content: str, class_: str = "") -> Markup:
    """An SVG with an accessible name."""
    about: dict[str, object] = {"role": "img", "aria_label": name, **({"class": class_} if class_ else {})}
    box = f"0 0 {number(width)} {number(height)}"
    return tag("svg", tag("title", name), *content, **about, viewBox=box, font_size=FONT)


def sized(
    draw: Callable[[float, float, str], Markup], narrow: tuple[float, float], wide: tuple[float, float]
) -> Markup:
    """A figure drawn twice, by width, height and class: scaling one drawing would make its letters tiny on a phone or
    huge on a desktop. A page shows the wide one where it has room and the figure is alone in its row."""
    return together(draw(*narrow, "narrow"), draw(*wide, "wide"))


def picture_file(name: str, width: float, height: float, *content: str) -> str:
    """A picture as a separate SVG file, with the colours of the report's pages."""
    style = tag("style", Markup(COLOURS + FIGURES))
    paper = tag("rect", width=width, height=height, fill="var(--paper)")
    box = f"0 0 {number(width)} {number(height)}"
    about: dict[str, object] = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria_label": name}
    drawing = tag("svg", tag("title", name), style, paper, *content, **about, viewBox=box, width=width, height=height,
                  font_family="system-ui, sans-serif", font_size=FONT)  # fmt: skip
    return f"{drawing}\n"


def legend_rows(labels: Sequence[tuple[str, int]], width: float) -> tuple[Markup, float]:
    """Legend as rows of dots and labels within `width`, and its height."""
    x, y, parts = 8.0, 10.0, []
    for label, index in labels:
        own = 22 + LETTER * len(label)
        if x + own > width:
            x, y = 8.0, y + 20
        parts.append(tag("circle", cx=x, cy=y, r=5, fill=colour(index)))
        parts.append(tag("text", label, x=x + 10, y=y + 4))
        x += own + 12
    return together(*parts), y + 10


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`; log: on a log scale."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> Scale:
        """An axis with some margin around the values; zero: starts at zero."""
        low, high = min(values), max(values)
        if log:
            room = max(0.12 * math.log(high / low), 0.12)
            return cls(low / math.exp(room), high * math.exp(room), start, end, True)
        room = max(0.12 * (high - (0.0 if zero else low)), 0.02 * abs(high)) or 1.0
        return cls(0.0 if zero else low - room, high + room, start, end)

    def ticks(self) -> list[float]:
        """About four to seven round values."""
        if self.log and self.high > 3 * self.low:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps: tuple[int, ...] = (1, 2, 5) if self.high < 200 * self.low else (1,)
            values = [step * 10.0**decade for decade in decades for step in steps]
            return [v for v in values if self.low <= v <= self.high]
        rough = (self.high - self.low) / 5
        base = 10.0 ** math.floor(math.log10(rough))
        step = next(m * base for m in (1, 2, 5, 10) if m * base >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


def axes(x: Scale, y: Scale, x_label: str, y_label: str, whole: bool = False) -> Markup:
    """Grid, tick labels and names of both axes; y.start is the bottom. Leave 46 pixels below and 50 at the left.

    whole: label only whole numbers in x.
    """
    parts = []
    for value in x.ticks():
        if whole and value != int(value):
            continue
        at = x(value)
        parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="grid"))
        parts.append(tag("text", f"{value:g}", x=at, y=y.start + 17, text_anchor="middle", class_="tick"))
    for value in y.ticks():
        at = y(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", f"{value:g}", x=x.start - 6, y=at + 4, text_anchor="end", class_="tick"))
    parts.append(tag("text", x_label, x=(x.start + x.end) / 2, y=y.start + 36, text_anchor="middle"))
    parts.append(tag("text", y_label, x=4, y=y.end - 10))
    return together(*parts)


def lines(name: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_label: str, y_label: str) -> Markup:
    """A line per series of (x, y), with y from zero; markers show their values. `name` is the accessible name."""

    def draw(width: float, height: float, class_: str) -> Markup:
        return picture(name, width, height, *curves(series, x_label, y_label, width, height), class_=class_)

    return sized(draw, (440.0, 280.0), (880.0, 340.0))


def curves(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_label: str, y_label: str, width: float, height: float
) -> list[Markup]:
    points = [point for _, own in series for point in own]
    x = Scale.around([p[0] for p in points], 50, width - 16)
    y = Scale.around([p[1] for p in points], height - 46, 28, zero=True)
    parts = [axes(x, y, x_label, y_label, whole=all(p[0] == int(p[0]) for p in points))]
    for i, (label, own) in enumerate(series):
        path = " ".join(f"{number(x(a))},{number(y(b))}" for a, b in own)
        dashes = {"stroke_dasharray": "5 3"} if i >= PALETTE else {}  # colours repeat
        parts.append(tag("polyline", points=path, fill="none", stroke=colour(i), stroke_width=2, **dashes))
        for a, b in own:
            said = tag("title", f"{label}: {b:.3g} at {a:g}")
            parts.append(tag("circle", said, cx=x(a), cy=y(b), r=4, fill=colour(i)))
    return parts


def legend(labels: Sequence[str], indices: Sequence[int] | None = None) -> Markup:
    """Legend as HTML; it wraps on a narrow screen."""
    shown = indices if indices is not None else range(len(labels))
    entries = []
    for i, label in zip(shown, labels, strict=True):
        dashed = "swatch dashed" if i >= PALETTE else "swatch"
        swatch = tag("span", class_=dashed, style=f"--own:{colour(i)}", aria_hidden="true")
        entries.append(tag("li", swatch, tag("span", label)))
    return tag("ul", *entries, class_="legend")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, caption: str = "") -> Markup:
    """An HTML table that scrolls sideways on a narrow screen."""
    head = tag("tr", *(tag("th", h, scope="col", class_=side(i < left)) for i, h in enumerate(headers)))
    body = [tag("tr", *(tag("td", cell, class_=side(i < left)) for i, cell in enumerate(row)))
            for row in rows]  # fmt: skip
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    said = [tag("p", caption, class_="caption")] if caption else []  # outside the scrolling part
    return together(*said, tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption or "table"))


def numbers(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str, left: int = 1) -> Markup:
    """A collapsed table with the numbers of a figure."""
    return tag("details", tag("summary", "Numbers"), table(headers, rows, left, caption))


def side(left: bool) -> str:
    return "left" if left else "right"
