"""`dmpt-export bench`: time exported models."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.cli.checks import overwrite
from dmpt_export.requests.bench import GEN, PROMPT, Benched, BenchRequest

if TYPE_CHECKING:
    from benchmarks.speed.results import Speed, Timings


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """Whole numbers of at least `least`, separated by commas."""

    name = "N,N,..."

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of whole numbers such as 512,128", param, ctx)
        if min(counts) < self.least:
            self.fail(f"{min(counts)} is below {self.least}", param, ctx)
        return counts


@click.command("bench", short_help="Time prefill and decoding of exported models.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--threads", "-t", type=Counts(1),
              help="CPU threads; several are timed in turn. Default: all available to this process.")  # fmt: skip
@click.option("--prompt", "-p", type=Counts(1), help=f"Tokens fed at once. Default: {PROMPT}.")
@click.option("--gen", "-n", type=Counts(1), help=f"Tokens decoded one by one. Default: {GEN}.")
@click.option("--depth", "-d", type=Counts(1),
              help="Tokens before the decoded ones. Default: the (first) prompt.")  # fmt: skip
@click.option("--repetitions", "-r", default=5, show_default=True, type=click.IntRange(min=1),
              help="Measured rounds, after one warm-up round.")  # fmt: skip
@click.option("--loads", default=3, show_default=True, type=click.IntRange(min=1),
              help="Fresh processes whose load time is measured; one more loads from disk.")  # fmt: skip
@click.option("--evict", is_flag=True, help="Also time decoding with the weights evicted from the CPU's caches, "
              "as on a device whose caches are small (cpu only).")  # fmt: skip
@click.option("--profile", is_flag=True, help="Also measure the time of a decoding step by node type.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE",
              help="HTML file with curves of decode time against context (several --depth), threads (several -t), "
              "heads, paths and K (several models).")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--format", "form", type=click.Choice(["md", "csv", "json"]), default="md", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, like --format json.")
@overwrite
def command(form: str, as_json: bool, **fields: Any) -> None:
    """Time MODEL..., folders made by `dmpt-export onnx`; NAME=FOLDER sets the name of a model.

    Each model runs in its own fresh process; several take turns in one interleaved schedule with the same prompt
    (fixed random tokens) and number of threads. In the table, pp512 is prefill of 512 tokens and tg128 @ d512 is
    greedy decoding of 128 tokens after 512 others, in tokens/s: median ± half the distance between the quartiles.
    Ratio: speed relative to the first model, round by round. Unsteady: the quartiles are more than 10 % of the median
    apart. The last line names a busy machine, and one that became more than 10 % faster or slower meanwhile. Roof:
    share of memory bandwidth, measured between the rounds, that reading the touched weights uses (cpu only; above
    100 % if the CPU's caches hold them). Weights: from memory (--evict reads other memory before every step, untimed),
    or whether the last-level cache is large enough for them. Python: share of a step spent outside ONNX Runtime.
    Default sizes shrink to the smallest context; given sizes must fit it. Loading is timed in fresh processes; cold
    means with the files dropped from the page cache (if the system supports that).

    \b
    Examples:
      dmpt-export bench gpt2-device device --threads 1
      dmpt-export bench device -p 512,128 -n 64 -d 128,960 --format csv
      dmpt-export bench device -d 128,512,896 -t 1,2 --profile --report bench.html
    Next: speed beside perplexity, as a table and a picture:
      dmpt-export compare gpt2-device device --data wiki.test.raw --out report
    """
    request = BenchRequest(**fields)
    request.run(request.check(), partial(show, form="json" if as_json else form))


def show(result: Benched, form: str) -> None:
    """Print the results."""
    from benchmarks import machine

    if form == "md":
        nodes = [node_table(result.nodes)] if result.nodes else []
        click.echo("\n\n".join([*map(as_text, result.rounds), *nodes]))
    elif form == "csv":
        click.echo(as_csv(result.rounds), nl=False)
    else:
        where, rows = {"machine": machine.machine(), "versions": machine.versions()}, result.rows
        click.echo(json.dumps({**rows[0], **where} if len(rows) == 1 else {"models": rows, **where}))


NODES = 14  # node types in the table; --json has all


def node_table(nodes: dict[str, dict[str, float]]) -> str:
    """Milliseconds per decoded token by node type, largest first, small ones together."""
    from benchmarks.report.table import markdown

    most: dict[str, float] = {}
    for own in nodes.values():
        most |= {kind: max(ms, most.get(kind, 0.0)) for kind, ms in own.items()}
    kinds = sorted(most, key=lambda kind: -most[kind])
    rows = [[kind, *(f"{own[kind]:.3f}" if kind in own else "-" for own in nodes.values())] for kind in kinds[:NODES]]
    if rest := kinds[NODES:]:
        rows.append(["others", *(f"{sum(own.get(kind, 0.0) for kind in rest):.3f}" for own in nodes.values())])
    return markdown(["ms per token in", *nodes], rows)


def as_text(results: Sequence[Speed]) -> str:
    """A table like llama-bench's, one line per test and model, and one for loading and memory."""
    from statistics import median

    from benchmarks.report.table import markdown, megabytes
    from benchmarks.speed.noise import busy, drift

    rows, above = [], False
    for speed in results:
        for test in speed.tests:
            found = speed.test_json(test, results[0])
            above |= (found["roof_share"] or 0) > 1
            shares = [percent(found[key]) for key in ("roof_share", "python_share")]
            weights = found["weights"] or "-"
            rows.append([speed.name, test.case.name, plus_minus(test), f"{found['ratio']:.2f}", weights, *shares])
    head = ["model", "test", "tokens/s", "ratio", "weights", "roof", "python"]
    if len(results) == 1:
        column = head.index("ratio")
        head, rows = head[:column] + head[column + 1 :], [row[:column] + row[column + 1 :] for row in rows]
    threads = results[0].threads
    conditions = [f"{threads} thread{'s' * (threads > 1)}"]
    if rates := results[0].read_bytes_per_s:
        each = ", ".join(f"{median(r) / 1e9:.1f} GB/s on {t}" for t, r in rates.items())
        conditions.append(f"memory bandwidth {each}")
    if cached := results[0].cached_bytes_per_s:
        each = ", ".join(f"{median(r) / 1e9:.1f} GB/s on {t}" for t, r in cached.items())
        conditions.append(f"last-level cache of {megabytes(results[0].cache_bytes)} {each}")
    if above:
        conditions.append("roof above 100 %: the CPU's caches hold the weights")
    conditions += filter(None, (busy(results[0].load_average), drift(results)))
    sizes = [
        [
            speed.name,
            *map(megabytes, (speed.size_bytes, speed.touched_bytes or 0, speed.rss_bytes, speed.peak_rss_bytes)),
            *(f"{median(seconds):.3f} s" if seconds else "-" for seconds in (speed.cold_load_s, speed.load_s)),
        ]
        for speed in results
    ]
    loading = markdown(["model", "size", "touched per token", "resident", "peak memory", "load cold", "load"], sizes)
    return f"{markdown(head, rows)}\n\n{loading}\n\n{'; '.join(conditions)}"


CSV = (
    "name", "test", "tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "ratio", "weights", "roof_share",
    "python_share",
    "tokens_per_s_q1", "tokens_per_s_q3", "switches", "threads", "size_bytes", "touched_bytes", "rss_bytes",
    "peak_rss_bytes", "cold_load_s", "load_s",
)  # fmt: skip


def as_csv(rounds: Sequence[Sequence[Speed]]) -> str:
    """A header, then one line per test and model; unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for results in rounds:
        for speed in results:
            shared = {"name": speed.name, **speed.to_json()}
            writer.writerows({**shared, **speed.test_json(test, results[0])} for test in speed.tests)
    return out.getvalue()


def plus_minus(test: Timings) -> str:
    """Median ± half the distance between the quartiles; a single disturbed round does not move it."""
    from statistics import median

    from benchmarks.speed.noise import mark
    from benchmarks.speed.results import quartiles

    low, high = quartiles(test.tokens_per_s)
    return f"{median(test.tokens_per_s):.1f} ± {(high - low) / 2:.1f}{mark(test.tokens_per_s)}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
