"""`dmpt-export compare`: models side by side."""

from __future__ import annotations

from pathlib import Path

import click

from dmpt_export.commands.eval import dequantize
from dmpt_export.extras import require


@click.command("compare", short_help="Put models side by side: size, quality, speed.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", multiple=True, type=click.Path(dir_okay=False), metavar="FILE",
              help="Text to score, as in eval. Without it only sizes and speeds are compared.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False),
              help="Folder for comparison.json, comparison.md and comparison.png.")  # fmt: skip
@click.option("--control", multiple=True, metavar="NAME",
              help="A row that is plain GPT-2 fine-tuned on the same tokens as the DMPT rows.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2), metavar="N",
              help="Tokens in a window. Default: 1024, or the smallest context if that is less.")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), metavar="N",
              help="Predictions scored in each window. Default: half a window.")  # fmt: skip
@click.option("--prompt", default=128, show_default=True, type=click.IntRange(min=1), help="Tokens fed at once.")
@click.option("--gen", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens decoded after them.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all this process may use.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def command(
    models: tuple[str, ...],
    data: tuple[str, ...],
    out: str | None,
    control: tuple[str, ...],
    max_length: int | None,
    stride: int | None,
    prompt: int,
    gen: int,
    repetitions: int,
    threads: int | None,
    device: str,
) -> None:
    """Compare any mix of models: GPT-2 folders or hub ids, DMPT and quantized folders, ONNX folders.

    NAME=MODEL gives a model another name. All are scored on the same text in the same windows, and the ONNX
    folders timed in one interleaved schedule, each in a process of its own; checkpoints have no speed (-).
    Whether DMPT gains anything can only be said beside a GPT-2 that was fine-tuned on the same tokens: mark it
    with --control.

    \b
    Example:
      dmpt-export compare tuned=gpt2-device device --control tuned --data wiki.test.raw --out report
    """
    exported = [(Path(model.partition("=")[2] or model) / "dmpt_manifest.json").is_file() for model in models]
    wanted = {device: any(exported), "train": not all(exported) or out is not None, "bench": bool(out and data)}
    require(*(extra for extra, needed in wanted.items() if needed))
    from benchmarks.comparison import Entry, compare
    from benchmarks.scorer import named
    from training.data import check_source

    for text in data:
        check_source(text)
    entries = [Entry(name, path, control=name in control) for name, path in named(models)]
    if unknown := set(control) - {entry.name for entry in entries}:
        names = ", ".join(entry.name for entry in entries)
        raise click.UsageError(f"--control {', '.join(sorted(unknown))} names no model here; these are: {names}")
    result = compare(
        entries,
        data,
        out,
        threads=threads,
        device=device,
        max_length=max_length,
        stride=stride,
        prompt=prompt,
        gen=gen,
        repetitions=repetitions,
        dequantize=dequantize,
    )
    click.echo(f"{result.table()}\n\n{result.reading}\n{result.conditions()}")
    if out is None:
        click.echo("Add --out DIR to keep this as JSON and Markdown, with a picture.", err=True)
    else:
        click.echo(
            f"Written to {out}" + ("" if result.has_picture else "; without --data there is no picture"), err=True
        )
