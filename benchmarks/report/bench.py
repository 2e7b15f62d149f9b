"""HTML report of `bench`: curves of decode time, and time by node type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine
from benchmarks.report import growth, svg
from benchmarks.report.page import document, facts_table
from benchmarks.report.svg import tag, together

MOST = 12  # node types drawn; the table has all


def page(rows: Sequence[Mapping[str, Any]], nodes: Mapping[str, Mapping[str, float]]) -> str:
    """An HTML document with the rows of `bench --json` and, if profiled, milliseconds by node type for each model."""
    facts = {**machine.machine(), **machine.versions()}
    curves = growth.figures(rows)
    nothing = tag("p", "No curves: give several --depth or --threads, or models that differ in heads, paths or K.")
    parts = [tag("h1", "Decode speed"), tag("div", curves, class_="plots") if curves else nothing]
    if nodes:
        parts.append(tag("h2", "Time per decoded token by node type"))
        parts.append(tag("div", *(bars(name, own) for name, own in nodes.items()), class_="plots"))
    return document("Decode speed", together(*parts, tag("h2", "How this was measured"), facts_table(facts)))


def bars(name: str, own: Mapping[str, float]) -> svg.Markup:
    """A bar per node type; the table has all of them."""
    shown = [(kind, ms) for kind, ms in own.items() if ms > 0][:MOST]
    width, label, height = 440.0, 170.0, 24.0
    x = svg.Scale(0.0, max(ms for _, ms in shown), label, width - 90)
    parts = []
    for i, (kind, ms) in enumerate(shown):
        top = height * i
        parts.append(svg.tag("text", kind, x=label - 6, y=top + 16, text_anchor="end"))
        parts.append(svg.tag("rect", x=label, y=top + 4, width=max(1.0, x(ms) - label), height=16, fill=svg.colour(1)))
        parts.append(svg.tag("text", f"{ms:.3f} ms", x=x(ms) + 6, y=top + 16, class_="tick"))
    title = f"{name}: " + ", ".join(f"{kind} {ms:.3f} ms" for kind, ms in shown)
    numbers = svg.numbers(["node type", "ms per token"], [[kind, f"{ms:.4f}"] for kind, ms in own.items()], name)
    drawn = svg.picture(title, width, height * len(shown) + 6, *parts)
    return tag("figure", tag("figcaption", name), drawn, numbers, aria_label=f"Time by node type of {name}")
