"""`dmpt-export bench`: how fast exported models run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dmpt_export.cli.extras import require

if TYPE_CHECKING:
    from benchmarks.speed.results import Speed, Timings
    from benchmarks.speed.timing import Target


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
@click.option("--threads", "-t", type=Counts(1),
              help="CPU threads; several are timed in turn. Default: all this process may use.")  # fmt: skip
@click.option("--prompt", "-p", default="512", show_default=True, type=Counts(1), help="Tokens fed at once.")
@click.option("--gen", "-n", default="128", show_default=True, type=Counts(1), help="Tokens decoded one by one.")
@click.option("--depth", "-d", type=Counts(1),
              help="Tokens before the decoded ones. Default: the (first) prompt.")  # fmt: skip
@click.option("--repetitions", "-r", default=5, show_default=True, type=click.IntRange(min=1),
              help="Rounds that count; one more goes before, as warm-up.")  # fmt: skip
@click.option("--loads", default=3, show_default=True, type=click.IntRange(min=1),
              help="Fresh processes whose load time is taken; one more reads the files from the disk.")  # fmt: skip
@click.option("--profile", is_flag=True, help="Also the time of a decoding step by node type.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE",
              help="HTML file for curves of decode time against context (several --depth), threads (several -t), "
              "heads, paths and K (several models).")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--format", "form", type=click.Choice(["md", "csv", "json"]), default="md", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output; as --format json.")
@click.pass_context
def command(
    context: click.Context,
    models: tuple[str, ...],
    threads: tuple[int, ...] | None,
    prompt: tuple[int, ...],
    gen: tuple[int, ...],
    depth: tuple[int, ...] | None,
    repetitions: int,
    loads: int,
    profile: bool,
    report: str | None,
    device: str,
    form: str,
    as_json: bool,
) -> None:
    """Time MODEL..., folders made by `dmpt-export onnx`; NAME=FOLDER gives one another name.

    Each model runs in a fresh process of its own; several take turns in one interleaved schedule with the same
    prompt (random tokens, always the same) and threads. In the table, pp512 is prefill of 512 tokens and
    tg128 @ d512 greedy decoding of 128 tokens after 512 others, in tokens/s: median ± half the distance between
    the quartiles; ratio is to the first model, round by round. Roof is the share of memory's read rate, measured in
    between, that reading the weights a token touches makes use of (cpu only; above 100 % where the CPU's caches hold
    them); python is what a step spends outside ONNX Runtime. Defaults shrink to the smallest context; numbers you give
    must fit it. Loading is timed in fresh processes, cold with the files dropped from the page cache (as far as the
    system heeds that).

    \b
    Examples:
      dmpt-export bench gpt2-device device --threads 1
      dmpt-export bench device -p 512,128 -n 64 -d 128,960 --format csv
      dmpt-export bench device -d 128,512,896 -t 1,2 --profile --report bench.html
    Next: speed beside perplexity, as a table and a picture:
      dmpt-export compare gpt2-device device --data wiki.test.raw --out report
    """
    require(device)
    from benchmarks import machine
    from benchmarks.quality.open_scorer import context_of
    from benchmarks.quality.scorer import named
    from benchmarks.speed.cases import cases
    from benchmarks.speed.profiling import profile as by_node
    from benchmarks.speed.timing import measure, target
    from training.checkpoints.atomic import check_inputs, check_place
    from training.progress import say

    targets = [target(name, path) for name, path in named(models)]
    given = [context.get_parameter_source(name) != ParameterSource.DEFAULT for name in ("prompt", "gen")]
    cases(prompt, gen, depth, min(context_of(t.path) for t in targets), *given)  # refused before anything is timed
    if report is not None:
        check_place(Path(report))
        check_inputs(Path(report), *(t.path for t in targets))
    say("loading each model in fresh processes")
    rounds = [
        measure(
            targets, prompt, gen, repetitions, count, device, loads=loads, fixed_prompt=given[0], fixed_gen=given[1],
            depth=depth, roof=device == "cpu", cold=1,
        )
        for count in threads or (None,)
    ]  # fmt: skip
    nodes = by_node(targets, rounds[0][0].first("tg").case, rounds[0][0].threads, device) if profile else {}
    rows = [row for results in rounds for row in rows_of(targets, results, nodes)]
    if form == "md" and not as_json:
        click.echo("\n\n".join([*map(as_text, rounds), *([node_table(nodes)] if nodes else [])]))
    elif form == "csv" and not as_json:
        click.echo(as_csv(rounds), nl=False)
    else:
        where = {"machine": machine.machine(), "versions": machine.versions()}
        click.echo(json.dumps({**rows[0], **where} if len(rows) == 1 else {"models": rows, **where}))
    if report is not None:
        write_report(Path(report), rows, nodes)


def rows_of(
    targets: Sequence[Target], results: Sequence[Speed], nodes: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """One object for each model of a round: its figures, with what they may depend on."""
    from benchmarks.comparison.contestants import onnx_shape
    from benchmarks.quality.scorer import scheme_of
    from runtime.manifest_file import read_manifest

    base = results[0] if len(results) > 1 else None
    return [
        {
            "model": t.path,
            "name": t.name,
            "scheme": scheme_of(read_manifest(Path(t.path)).raw),
            "shape": onnx_shape(t.path),
            "node_ms": nodes.get(t.name),
            **found.to_json(base),
        }
        for t, found in zip(targets, results, strict=True)
    ]


def write_report(file: Path, rows: list[dict[str, Any]], nodes: dict[str, dict[str, float]]) -> None:
    """The curves as one HTML file, in one step; where nothing was measured twice it says so."""
    from benchmarks.report.bench import page
    from training.checkpoints.atomic import atomic_file

    with atomic_file(file) as partial:
        partial.write_text(page(rows, nodes), encoding="utf-8")


NODES = 14  # node types in the table; --json has all


def node_table(nodes: dict[str, dict[str, float]]) -> str:
    """Milliseconds of a decoded token by node type, the most first, small ones together."""
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
    """A table in llama-bench's style, a line for each test of each model, and one of loading and memory."""
    from statistics import median

    from benchmarks.report.table import markdown, megabytes

    rows, above = [], False
    for speed in results:
        for test in speed.tests:
            found = speed.test_json(test, results[0])
            above |= (found["roof_share"] or 0) > 1
            shares = [percent(found[key]) for key in ("roof_share", "python_share")]
            rows.append([speed.name, test.case.name, plus_minus(test), f"{found['ratio']:.2f}", *shares])
    head = ["model", "test", "tokens/s", "ratio", "roof", "python"]
    if len(results) == 1:
        column = head.index("ratio")
        head, rows = head[:column] + head[column + 1 :], [row[:column] + row[column + 1 :] for row in rows]
    threads = results[0].threads
    conditions = [f"{threads} thread{'s' * (threads > 1)}"]
    if rates := results[0].read_bytes_per_s:
        each = ", ".join(f"{median(r) / 1e9:.1f} GB/s on {t}" for t, r in rates.items())
        conditions.append(f"memory is read at {each}")
    if above:
        conditions.append("roof above 100 %: weights that stay in the CPU's caches are read faster than memory")
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
    "name", "test", "tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "ratio", "roof_share", "python_share",
    "tokens_per_s_q1", "tokens_per_s_q3", "switches", "threads", "size_bytes", "touched_bytes", "rss_bytes",
    "peak_rss_bytes", "cold_load_s", "load_s",
)  # fmt: skip


def as_csv(rounds: Sequence[Sequence[Speed]]) -> str:
    """A header, then a line for each test of each model; empty where nothing is known."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for results in rounds:
        for speed in results:
            shared = {"name": speed.name, **speed.to_json()}
            writer.writerows({**shared, **speed.test_json(test, results[0])} for test in speed.tests)
    return out.getvalue()


def plus_minus(test: Timings) -> str:
    """Median ± half the distance between the quartiles, which one disturbed round does not move."""
    from statistics import median

    from benchmarks.speed.results import quartiles

    low, high = quartiles(test.tokens_per_s)
    return f"{median(test.tokens_per_s):.1f} ± {(high - low) / 2:.1f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
