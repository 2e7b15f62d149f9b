"""`dmpt-export bench`: how fast exported models run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dmpt_export.extras import require

if TYPE_CHECKING:
    from benchmarks.results import Speed, Timings


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """Whole numbers from `least` on, separated by commas."""

    name = "N,N,..."

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"'{value}' is no list of whole numbers like 512,128", param, ctx)
        if min(counts) < self.least:
            self.fail(f"{min(counts)} is below {self.least}", param, ctx)
        return counts


@click.command("bench", short_help="Time prefill and decoding of exported models.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--threads", "-t", type=click.IntRange(min=1), help="CPU threads. Default: all this process may use.")
@click.option("--prompt", "-p", default="512", show_default=True, type=Counts(1), help="Tokens fed at once.")
@click.option("--gen", "-n", default="128", show_default=True, type=Counts(1), help="Tokens decoded one by one.")
@click.option("--depth", "-d", type=Counts(1),
              help="Tokens before the decoded ones. Default: the (first) prompt.")  # fmt: skip
@click.option("--repetitions", "-r", default=5, show_default=True, type=click.IntRange(min=1),
              help="Rounds that count; one more goes before, as warm-up.")  # fmt: skip
@click.option("--loads", default=3, show_default=True, type=click.IntRange(min=1),
              help="Fresh processes whose load time is taken.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--format", "form", type=click.Choice(["md", "csv", "json"]), default="md", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output; as --format json.")
@click.pass_context
def command(
    context: click.Context,
    models: tuple[str, ...],
    threads: int | None,
    prompt: tuple[int, ...],
    gen: tuple[int, ...],
    depth: tuple[int, ...] | None,
    repetitions: int,
    loads: int,
    device: str,
    form: str,
    as_json: bool,
) -> None:
    """Time MODEL..., folders made by `dmpt-export onnx`; NAME=FOLDER gives one another name.

    Each model runs in a fresh process of its own; several take turns in one interleaved schedule with the same
    prompt (random tokens, always the same) and threads. In the table, pp512 is prefill of 512 tokens and
    tg128 @ d512 greedy decoding of 128 tokens after 512 others, in tokens/s: median ± half the distance from least
    to greatest; ratio is to the first model, round by round. Roof is the share of memory's read rate, measured in
    between, that reading the weights a token touches makes use of (cpu only); python is what a step spends outside ONNX
    Runtime. Defaults shrink to the smallest context; numbers you give must fit it.

    \b
    Examples:
      dmpt-export bench gpt2-device device --threads 1
      dmpt-export bench device -p 512,128 -n 64 -d 128,960 --format csv
    Next: speed beside perplexity, as a table and a picture:
      dmpt-export compare gpt2-device device --data wiki.test.raw --out report
    """
    require(device)
    from benchmarks import machine
    from benchmarks.scorer import named
    from benchmarks.speed import measure, target

    targets = [target(name, path) for name, path in named(models)]
    given = [context.get_parameter_source(name) != ParameterSource.DEFAULT for name in ("prompt", "gen")]
    results = measure(
        targets, prompt, gen, repetitions, threads, device, loads=loads, fixed_prompt=given[0], fixed_gen=given[1],
        depth=depth, roof=device == "cpu",
    )  # fmt: skip
    if form == "md" and not as_json:
        click.echo(as_text(results))
    elif form == "csv" and not as_json:
        click.echo(as_csv(results), nl=False)
    else:
        where = {"machine": machine.machine(), "versions": machine.versions()}
        base = results[0] if len(results) > 1 else None
        rows = [{"model": t.path, "name": t.name, **r.to_json(base)} for t, r in zip(targets, results, strict=True)]
        click.echo(json.dumps({**rows[0], **where} if len(rows) == 1 else {"models": rows, **where}))


def as_text(results: Sequence[Speed]) -> str:
    """A table in llama-bench's style, a line for each test of each model."""
    from statistics import median

    from benchmarks.table import markdown, megabytes

    rows = []
    for speed in results:
        shared = [speed.name, *map(megabytes, (speed.size_bytes, speed.rss_bytes, speed.peak_rss_bytes))]
        for test in speed.tests:
            found = speed.test_json(test, results[0])
            shares = [percent(found[key]) for key in ("roof_share", "python_share")]
            rows.append([*shared, test.case.name, plus_minus(test), f"{found['ratio']:.2f}", *shares])
    head = ["model", "size", "resident", "peak memory", "test", "tokens/s", "ratio", "roof", "python"]
    if len(results) == 1:
        column = head.index("ratio")
        head, rows = head[:column] + head[column + 1 :], [row[:column] + row[column + 1 :] for row in rows]
    threads = results[0].threads
    conditions = [f"{threads} thread{'s' * (threads > 1)}"]
    if rates := results[0].read_bytes_per_s:
        each = ", ".join(f"{median(r) / 1e9:.1f} GB/s on {t}" for t, r in rates.items())
        conditions.append(f"memory is read at {each}")
    return f"{markdown(head, rows)}\n\n{'; '.join(conditions)}"


CSV = (
    "name", "test", "tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "ratio", "roof_share", "python_share",
    "switches", "threads", "size_bytes", "rss_bytes", "peak_rss_bytes", "load_s",
)  # fmt: skip


def as_csv(results: Sequence[Speed]) -> str:
    """A header, then a line for each test of each model; empty where nothing is known."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for speed in results:
        shared = {"name": speed.name, **speed.to_json()}
        writer.writerows({**shared, **speed.test_json(test, results[0])} for test in speed.tests)
    return out.getvalue()


def plus_minus(test: Timings) -> str:
    """Median ± half the range."""
    from statistics import median

    rates = test.tokens_per_s
    return f"{median(rates):.1f} ± {(max(rates) - min(rates)) / 2:.1f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
