"""`dmpt-export demo`: all steps once, on text that comes with every Python."""

from __future__ import annotations

from pathlib import Path

import click

from dmpt_export.cli.checks import Finite
from dmpt_export.extras import require


@click.command("demo", short_help="Train, quantize, export, run and compare small models.")
@click.option("--out", type=click.Path(file_okay=True, path_type=Path), default=Path("demo-out"), show_default=True,
              help="Folder for all results; a stopped demo there goes on, a finished one is replaced.")  # fmt: skip
@click.option("--data", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Text to train and test on instead (plain, .xz, .gz); may be repeated.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True,
              help="Seed of weights, data order and sampling.")  # fmt: skip
@click.option("--scale", type=Finite(min=0, min_open=True), default=1.0, show_default=True,
              help="Factor on the training steps; time and quality grow with it.")  # fmt: skip
def command(out: Path, data: tuple[Path, ...], seed: int, scale: float) -> None:
    """Run all steps in about five minutes on two cores, without network.

    Builds a corpus from the documentation inside this Python and a tokenizer for it; trains a small GPT-2;
    fine-tunes it, and a dual-path DMPT made from it, on the same number of tokens; quantizes both to int8 and
    int4; exports all to ONNX and checks each export against torch; generates some text with the quantized DMPT; and
    prints a table of sizes, held-out perplexity and speed, also written as report.html and comparison.json, .md,
    .csv and .svg.

    \b
    Examples:
      dmpt-export demo
      dmpt-export demo --scale 4 --out longer           about four times the training
      dmpt-export demo --data book.txt --out book-demo
    Next, with the results:
      dmpt-export run demo-out/onnx/dmpt-int8 "Return a new"
      dmpt-export inspect demo-out/onnx/dmpt-int8
    """
    require("train", "cpu", "bench")
    from dmpt_export.demo.pipeline import Demo
    from dmpt_export.demo.settings import Settings

    demo = Demo(out, data, seed, Settings().scaled(scale))
    demo.run()
    click.echo(f"\nEverything is in {out}; open {out / 'report.html'}", err=True)
    click.echo(f'Try: dmpt-export run {out / "onnx" / "dmpt-int8"} "Return a new"', err=True)
