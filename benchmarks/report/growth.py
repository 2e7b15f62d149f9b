"""Curves of decode time against context, threads, heads, paths and K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.comparison.model_result import Row
from benchmarks.report import svg

Rows = Sequence[Mapping[str, Any]]
Series = list[tuple[str, list[tuple[float, float]]]]  # label -> (x, milliseconds per token)
# x axis -> the other figures of a row that must be equal for its points to be joined
SHAPES = {"heads": ("paths",), "paths": ("heads",), "fast_k": ("paths", "heads")}
LABELS = {
    "context": "tokens of context",
    "threads": "threads",
    "heads": "heads per path",
    "paths": "paths",
    "fast_k": "K, candidates of fast-k",
}


def growth(rows: Rows) -> dict[str, Series]:
    """X axis -> lines with at least two points; rows come from `bench --json` or a comparison."""
    timed = [row for row in rows if row.get("tests")]
    found = {"context": by_context(timed), "threads": by_threads(timed)}
    found |= {what: by_shape(timed, what, same) for what, same in SHAPES.items()}
    return {what: series for what, series in found.items() if series}


def apart(others: Rows, rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """Rows of `bench --json`, renamed where a row of the comparison has their name: times of two runs do not join."""
    taken = {row.name for row in rows}
    return [{**row, "name": f"{row['name']} (bench)"} if row["name"] in taken else row for row in others]


def by_context(rows: Rows) -> Series:
    """x is the mean context of the decoded tokens."""
    several = len({row["threads"] for row in rows}) > 1
    lines = []
    for row in rows:
        label = f"{row['name']}, {threads_of(row)}" if several else row["name"]
        lines.append((label, [(t["depth"] + t["tokens"] / 2, ms(t)) for t in row["tests"] if decodes(t)]))
    return joined(lines)


def decodes(test: Mapping[str, Any]) -> bool:
    """A decoding test without eviction; earlier results have none."""
    return bool(test["test"].startswith("tg") and not test.get("evict"))


def by_threads(rows: Rows) -> Series:
    return joined([(f"{row['name']}{at_depth(row, rows)}", [(row["threads"], ms(first(row)))]) for row in rows])


def by_shape(rows: Rows, what: str, same: Sequence[str]) -> Series:
    """Models with equal storage that differ in `what`; K 0 means all and is left out."""
    lines = []
    for row in rows:
        shape = row.get("shape") or {}
        if shape.get(what):
            others = ", ".join(f"{shape[key]} {key}" for key in same)
            label = f"{row['scheme']}, {others}, {threads_of(row)}{at_depth(row, rows)}"
            lines.append((label, [(shape[what], ms(first(row)))]))
    return joined(lines)


def at_depth(row: Mapping[str, Any], rows: Rows) -> str:
    """The context of a row's first test where the rows differ in it: their times must not be joined."""
    depth = first(row)["depth"]
    return f", context {depth}" if any(first(other)["depth"] != depth for other in rows) else ""


def threads_of(row: Mapping[str, Any]) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] > 1)}"


def first(row: Mapping[str, Any]) -> Mapping[str, Any]:
    test: Mapping[str, Any] = next(t for t in row["tests"] if t["test"].startswith("tg"))
    return test


def ms(test: Mapping[str, Any]) -> float:
    return 1000.0 / float(test["tokens_per_s"])


def joined(lines: Series) -> Series:
    """Merge lines with the same label, in order of x; lines with a single x are left out."""
    merged: dict[str, list[tuple[float, float]]] = {}
    for label, points in lines:
        merged.setdefault(label, []).extend(points)
    return [(label, sorted(points)) for label, points in merged.items() if len({x for x, _ in points}) > 1]


def figures(rows: Rows) -> svg.Markup:
    """All growth curves as HTML figures, each with its numbers as a table; "" without curves."""
    return svg.together(*(figure(what, series) for what, series in growth(rows).items()))


def figure(what: str, series: Series) -> svg.Markup:
    ends = "; ".join(
        f"{label}: {p[0][1]:.3g} ms at {p[0][0]:g}, {p[-1][1]:.3g} ms at {p[-1][0]:g}" for label, p in series
    )
    drawn = svg.lines(f"Decode time against {LABELS[what]}: {ends}", series, LABELS[what], "ms per token")
    rows = [[label, f"{x:g}", f"{y:.3f}"] for label, points in series for x, y in points]
    name = f"Decode time against {LABELS[what]}"
    numbers = svg.numbers(["model", LABELS[what], "ms per token"], rows, name)
    return svg.tag("figure", svg.legend([label for label, _ in series]), drawn, numbers, aria_label=name)
