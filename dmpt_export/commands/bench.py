"""`dmpt-export bench`: how fast exported models run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from dmpt_export.extras import require

if TYPE_CHECKING:
    from benchmarks.speed import Speed


@click.command("bench", short_help="Time prefill and decoding of exported models.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all this process may use.")
@click.option("--prompt", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens fed at once.")
@click.option("--gen", default=128, show_default=True, type=click.IntRange(min=1), help="Tokens decoded after them.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1),
              help="Rounds that count; one more goes before, as warm-up.")  # fmt: skip
@click.option("--loads", default=3, show_default=True, type=click.IntRange(min=1),
              help="Fresh processes whose load time is taken.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.pass_context
def command(
    context: click.Context,
    models: tuple[str, ...],
    threads: int | None,
    prompt: int,
    gen: int,
    repetitions: int,
    loads: int,
    device: str,
    as_json: bool,
) -> None:
    """Time MODEL..., folders made by `dmpt-export onnx`; NAME=FOLDER gives one another name.

    Each model runs in a fresh process of its own; several take turns in one interleaved schedule with the same
    prompt (random tokens, always the same) and threads. In the table, pp512 is prefill of 512 tokens and tg128
    greedy decoding of 128 tokens after them, both in tokens/s: median ± half the distance from least to
    greatest. Defaults shrink to the smallest context; numbers you give must fit it.

    \b
    Example:
      dmpt-export bench gpt2-device device --threads 1
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
        targets, prompt, gen, repetitions, threads, device, loads=loads, fixed_prompt=given[0], fixed_gen=given[1]
    )
    if not as_json:
        click.echo(as_text(results))
        return
    where = {"machine": machine.machine(), "versions": machine.versions()}
    rows = [{"model": t.path, "name": t.name, **r.to_json()} for t, r in zip(targets, results, strict=True)]
    click.echo(json.dumps({**rows[0], **where} if len(rows) == 1 else {"models": rows, **where}))


def as_text(results: Sequence[Speed]) -> str:
    """A table in llama-bench's style, two lines a model."""
    from benchmarks.table import markdown, megabytes

    rows = []
    for speed in results:
        shared = [speed.name, megabytes(speed.size_bytes), megabytes(speed.peak_rss_bytes), str(speed.threads)]
        for test, samples in (
            (f"pp{speed.prompt_tokens}", speed.prefill),
            (f"tg{speed.generated_tokens}", speed.decode),
        ):
            rows.append([*shared, test, plus_minus(samples)])
    return markdown(["model", "size", "peak memory", "threads", "test", "tokens/s"], rows)


def plus_minus(samples: Sequence[float]) -> str:
    """Median ± half the range."""
    from statistics import median

    return f"{median(samples):.1f} ± {(max(samples) - min(samples)) / 2:.1f}"
