"""The HTML page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.comparison.model_result import Row, cells, columns, merit
from benchmarks.comparison.ranking import front
from benchmarks.comparison.result import Comparison
from benchmarks.report import frontier, growth, layers, routes, svg
from benchmarks.report.svg import Markup, tag, together
from benchmarks.report.theme import COLOURS, FIGURES

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser blocks everything else
STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}
figure{margin:1rem 0;min-width:0}figcaption,.small{color:var(--soft);font-size:.875rem}
svg{display:block;width:100%;max-width:36rem;height:auto;font-family:inherit}
.plots{display:grid;gap:1rem;align-items:start;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr))}
.plots>*{min-width:0}svg.wide{display:none;max-width:none}
@media(min-width:60rem){.plots>figure:only-child>svg.wide{display:block}.plots>figure:only-child>svg.narrow{display:none}}
.legend{overflow-wrap:anywhere;display:flex;flex-wrap:wrap;gap:.2rem 1rem;list-style:none;padding:0;margin:.5rem 0}
.swatch{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.4em;
background:var(--own);border:2px solid var(--own)}
.dashed{background:none;border-style:dashed}
.scroll{overflow-x:auto;background:
linear-gradient(to right,var(--paper) 40%,transparent) left/3rem 100% no-repeat local,
linear-gradient(to left,var(--paper) 40%,transparent) right/3rem 100% no-repeat local,
linear-gradient(to right,color-mix(in srgb,var(--soft) 45%,transparent),transparent) left/.8rem 100% no-repeat,
linear-gradient(to left,color-mix(in srgb,var(--soft) 45%,transparent),transparent) right/.8rem 100% no-repeat}
table{border-collapse:collapse;font-size:.875rem}
.caption{color:var(--soft);font-size:.875rem;margin:.5rem 0 0}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}td.left,th.left{text-align:left}
.facts td{white-space:normal;overflow-wrap:anywhere}.facts td:first-child{overflow-wrap:break-word}
.claim{border-left:4px solid var(--c1);padding:.5rem .8rem;background:var(--tint)}
.routes{white-space:pre-wrap;line-height:2}
.token{background:color-mix(in srgb,var(--path) 22%,transparent);border-bottom:2px solid var(--path);border-radius:2px}
summary{cursor:pointer;padding:.2rem 0}code{overflow-wrap:anywhere}
"""


def page(result: Comparison) -> str:
    """The report as one HTML document."""
    rows = result.rows
    parts = [
        tag("h1", "Comparison"),
        tag("p", result.conditions(), class_="small"),
        tag("h2", "DMPT against its control"),
        tag("p", result.reading, class_="claim"),
        beside_control(rows),
        tag("h2", "Models"),
        models_table(rows),
        bullets(result.notes()),
    ]
    if drawn := frontier.draw(rows):
        parts += [tag("h2", f"Size, {merit(rows)} and speed"), tag("div", drawn, class_="plots")]
    if curves := growth.figures([*(row.to_json() for row in rows), *growth.apart(result.growth, rows)]):
        parts += [tag("h2", "Growth of decode time"), tag("div", curves, class_="plots")]
    if maps := layers.figures([(row.name, row.path) for row in rows if row.kind in ("onnx", "quantized")]):
        parts += [tag("h2", "Bits and damage by layer"), tag("div", maps, class_="plots")]
    if result.routes:
        parts += [tag("h2", "Routes of a sample text"), routes.figure(result.routes)]
    parts += [tag("h2", "How this was measured"), made(result)]
    return document("Comparison", together(*parts))


def document(title: str, body: Markup) -> str:
    """A complete HTML document around `body`; it fetches nothing, not even an icon."""
    head = together(
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Markup(COLOURS + FIGURES + STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', tag('main', body)), lang='en')}\n"


def beside_control(rows: list[Row]) -> Markup:
    """Each DMPT with its control in the same scheme; without a control, the line under the heading says so."""
    controls = {row.scheme: row for row in reversed(rows) if row.control and not row.is_dmpt}
    heads, body = ordered(rows), []
    for row in rows:
        if row.is_dmpt:
            control = controls.get(row.scheme)
            other = picked(control, heads) if control else ["missing", *["-"] * (len(heads) - 1)]
            body += [["DMPT", *picked(row, heads)], ["control", *other]]
    if not body:
        return Markup()
    return svg.table(["", *heads], body, 2, "Each DMPT with its control, in the same scheme")


def models_table(rows: list[Row]) -> Markup:
    """The table, numbered as in the figure; brackets hold the quartiles of the speed."""
    ahead, heads, body = set(front(rows)), ordered(rows), []
    at = heads.index("file size") + 1  # where the mark goes
    for i, row in enumerate(rows, 1):
        values = picked(row, heads)
        if row.speed:
            timed = row.speed.to_json()
            middle = f" ({timed['decode_tokens_per_s_q1']:.1f}-{timed['decode_tokens_per_s_q3']:.1f})"
            values[heads.index("decode tokens/s")] += middle
        body.append([str(i), *values[:at], "yes" if row.name in ahead else "-", *values[at:]])
    caption = (
        "Speeds: medians, with quartiles over the rounds in brackets. "
        f"Best trade-off: no other model is at least as good in {merit(rows)}, decode time and size, and better in one."
    )
    return svg.table(["#", *heads[:at], "best trade-off", *heads[at:]], body, 2, caption)


def ordered(rows: Sequence[Row]) -> list[str]:
    """Columns, most important first: a phone shows the first few without scrolling."""
    first = ["model", merit(rows), "decode tokens/s", "file size"]
    return first + [name for name in columns(rows) if name not in first]


def picked(row: Row, names: Sequence[str]) -> list[str]:
    values = cells(row)
    return [values[name] for name in names]


def bullets(lines: list[str]) -> Markup:
    return tag("ul", *(tag("li", line) for line in lines))


def facts_table(facts: Mapping[str, Any]) -> Markup:
    """Machine and versions of the measurement."""
    rows = [[key, str(value)] for key, value in facts.items()]
    return tag("div", svg.table(["what", "value"], rows, 2, "Machine and versions"), class_="facts")


def made(result: Comparison) -> Markup:
    facts: dict[str, Any] = {
        "created": result.created,
        "command": " ".join(result.command),
        "text": ", ".join(result.data) or "none",
        **result.machine,
        **result.versions,
        **{
            row.name: ", ".join(f"{k} {v}" for k, v in row.versions.items() if v) for row in result.rows if row.versions
        },
    }
    return facts_table(facts)
