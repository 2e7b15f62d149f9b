"""Rank models by each figure, and find the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.comparison.model_result import Row, merit


def seconds_per_token(row: Row) -> float | None:
    return 1 / row.decode_tokens_per_s if row.decode_tokens_per_s else None


def size(row: Row) -> float | None:
    return float(row.size_bytes) if row.size_bytes else None


def figures(rows: Sequence[Row]) -> Mapping[str, Callable[[Row], float | None]]:
    """Name -> figure to rank by; lower is better, None is not ranked."""
    quality = merit(rows)
    return {quality: lambda row: row.figure(quality), "decode time": seconds_per_token, "size": size}


def rankings(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Figure -> names, best first; models without that figure are left out."""
    known = {
        what: [(v, row.name) for row in rows if (v := figure(row)) is not None]
        for what, figure in figures(rows).items()
    }
    return {what: [name for _, name in sorted(pairs, key=lambda pair: pair[0])] for what, pairs in known.items()}


def front(rows: Sequence[Row], timed: bool = True) -> list[str]:
    """Names of the best trade-offs (the Pareto front): no other row is at least as good in quality, decode time and
    size, and better in one of them.

    timed: whether decode time counts.

    Only rows with all figures take part: a model that was not timed can be neither better nor worse.
    """
    counted = [figure for what, figure in figures(rows).items() if timed or what != "decode time"]
    points = {row.name: [figure(row) for figure in counted] for row in rows}
    whole = {name: [v for v in values if v is not None] for name, values in points.items() if None not in values}
    return [name for name, mine in whole.items() if not any(beats(its, mine) for its in whole.values())]


def beats(a: Sequence[float], b: Sequence[float]) -> bool:
    """
    >>> beats([1, 2], [1, 3]), beats([1, 3], [2, 2]), beats([1, 2], [1, 2])
    (True, False, False)
    """
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)
