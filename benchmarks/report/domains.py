"""Domains and paths, as a table and as a picture: which paths a domain takes, and what it loses on each alone."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.quality.by_domain import DomainQuality
from benchmarks.report import svg
from benchmarks.report.table import markdown, readable

WIDTH, LEFT, RIGHT = 760.0, 150.0, 250.0  # pixels: of the picture, and beside the bars
ROW, BAR = 46.0, 22.0


def domain_table(domains: Mapping[str, DomainQuality]) -> str:
    """A line per domain: perplexity as deployed and on each path alone, shares of the paths, share routed as taught."""
    one = next(iter(domains.values()))
    leaves = list(one.quality.route_shares) if len(one.quality.route_shares) > 1 else []
    head = ["domain", "tokens", "perplexity", *(f"{leaf} alone" for leaf in one.paths)]
    head += [*(f"to {leaf}" for leaf in leaves), *(["as taught"] if any(d.serving for d in domains.values()) else [])]
    rows = []
    for name, found in domains.items():
        quality = found.quality
        row = [name, f"{quality.tokens_scored:,}"]
        row.append(f"{readable(quality.perplexity)} ± {readable(quality.perplexity * quality.standard_error)}")
        row += [readable(perplexity) for perplexity in found.paths.values()]
        row += [f"{100 * quality.route_shares[leaf]:.1f} %" for leaf in leaves]
        if "as taught" in head:
            taught = found.as_taught
            row.append("-" if taught is None else f"{100 * taught:.1f} % ({', '.join(found.serving)})")
        rows.append(row)
    return markdown(head, rows)


def picture(model: str, domains: Mapping[str, DomainQuality]) -> str:
    """An SVG file: for each domain a bar of its tokens by path, a line over the paths taught, and perplexities."""
    leaves = list(dict.fromkeys(leaf for found in domains.values() for leaf in found.quality.route_shares))
    key, top = svg.legend_rows([(leaf, i + 1) for i, leaf in enumerate(leaves)], WIDTH)
    top += 34
    rows = [row(name, found, leaves, top + i * ROW) for i, (name, found) in enumerate(domains.items())]
    head = [
        svg.tag("text", "share of the tokens by path; line: the path taught", x=LEFT, y=top - 16, class_="tick"),
        svg.tag("text", "perplexity", x=WIDTH - RIGHT + 12, y=top - 16, class_="tick"),
    ]
    return svg.picture_file(f"Domains and paths of {model}", WIDTH, top + len(domains) * ROW, key, *head, *rows)


def row(name: str, found: DomainQuality, leaves: list[str], y: float) -> svg.Markup:
    room, at = WIDTH - LEFT - RIGHT, LEFT
    parts = [svg.tag("text", name, x=LEFT - 10, y=y + 15, text_anchor="end")]
    shares = found.quality.route_shares
    for i, leaf in enumerate(leaves):
        width = room * shares.get(leaf, 0.0)
        said = f"{100 * shares.get(leaf, 0.0):.0f} %"
        title = svg.tag("title", f"{name}: {said} of the tokens take {leaf}")
        parts.append(svg.tag("rect", title, x=at, y=y, width=width, height=BAR, fill=svg.colour(i + 1)))
        if leaf in found.serving and width > 0:
            line = {"stroke": "var(--ink)", "stroke_width": 3}
            parts.append(svg.tag("line", x1=at, x2=at + width, y1=y - 3, y2=y - 3, **line))
        if width > svg.LETTER * len(said) + 8:
            parts.append(svg.tag("text", said, x=at + width / 2, y=y + 15, text_anchor="middle", class_="label"))
        at += width
    left = WIDTH - RIGHT + 12
    parts.append(svg.tag("text", readable(found.quality.perplexity), x=left, y=y + 10))
    alone = ", ".join(f"{leaf} {readable(perplexity)}" for leaf, perplexity in found.paths.items())
    if alone:
        parts.append(svg.tag("text", f"alone: {alone}", x=left, y=y + 26, class_="tick"))
    return svg.together(*parts)
