"""`dmpt-export compare`: compare models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.cli.checks import TableChoice, overwrite, protocols
from dmpt_export.requests.compare import CompareRequest

if TYPE_CHECKING:
    from benchmarks.comparison.result import Comparison


@click.command("compare", short_help="Compare models: size, quality, speed.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", multiple=True, type=click.Path(dir_okay=False), metavar="FILE",
              help="Text to score, as in eval. Without it, only size and speed are compared.")  # fmt: skip
@click.option("--text-field", default="text", show_default=True, metavar="NAME",
              help="Where the text is in JSONL, Parquet and datasets.")  # fmt: skip
@click.option("--protocol", type=TableChoice("protocol", protocols), default="stride-concat", show_default=True,
              help="What is scored after what, as in eval.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False),
              help="Folder for report.html and comparison.json, .md, .csv and .svg.")  # fmt: skip
@click.option("--control", multiple=True, metavar="NAME",
              help="A plain GPT-2 trained like the DMPT rows; records of training are compared.")  # fmt: skip
@click.option("--peers", metavar="GPT2",
              help="Also measure every installed peer on this GPT-2 folder or hub id.")  # fmt: skip
@click.option("--peer-python", multiple=True, metavar="PEER=PYTHON",
              help="Python interpreter that has the peer, if not this one.")  # fmt: skip
@click.option("--growth", multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Output of `bench --json` to draw in the report's growth curves.")  # fmt: skip
@click.option("--resume", type=click.Path(file_okay=False), metavar="FOLDER",
              help="Folder for converted peers and scores. A repeated comparison continues there and only scores new "
              "models. Speed is always timed again, all models in one schedule.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2), metavar="N",
              help="Window length in tokens. Default: 1024, or the smallest context if that is less.")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), metavar="N",
              help="Predictions scored in each window. Default: half a window.")  # fmt: skip
@click.option(
    "--prompt",
    default=128,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens fed at once; this and --gen shrink to the smallest context.",
)
@click.option("--gen", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens decoded next.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1), help="Measured rounds.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all available to this process.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@overwrite
def command(**fields: Any) -> None:
    """Compare any mix of models: GPT-2 folders or hub ids, DMPT and quantized folders, ONNX folders, peers.

    NAME=MODEL sets the name of a model. All are scored on the same text in the same windows; ONNX folders and peers are
    timed in one interleaved schedule, each in its own process; checkpoints have no speed (-). If tokenizers differ, the
    table has perplexity per word and bits per byte instead of figures per token.
    Only a GPT-2 trained alike can show what a DMPT gains: mark it with --control. Models record what they were trained
    on (base, tokens). If these differ there is no verdict; if they are not recorded, the line says so.

    A peer is another runtime for plain GPT-2, given as PEER:SCHEME@GPT2: transformers:fp32 :bf16,
    optimum:fp32 :int8, openvino:int8 :int4, llama.cpp:q8_0 :q4_0, ctranslate2:fp32 :int8, bitsandbytes:int8 :nf4.
    --peers GPT2 adds all installed ones and lists the install commands of the others. A model that fails becomes a row
    with the reason, and the rest continues; unless it is a peer, the exit code is 4.

    \b
    Examples:
      dmpt-export compare control=gpt2-device device --control control --data wiki.test.raw --out report
      dmpt-export compare gpt2-device device openvino:int8@./gpt2 --data wiki.test.raw --out report
      dmpt-export compare gpt2-device device --peers ./gpt2 --peer-python openvino=/venv/bin/python --out report
    """
    request = CompareRequest(**fields)
    result = request.run(request.check(), show)
    if request.out is None:
        click.echo("Add --out DIR to save this, with a report and figures.", err=True)
    else:
        more_data = "" if request.data else "; with --data it would also compare quality"
        click.echo(f"Written to {request.out}: open {Path(request.out) / 'report.html'}{more_data}", err=True)
    if result.failed:
        from training.errors import ValidationError

        raise ValidationError(f"{', '.join(result.failed)} could not be measured: see the table for the reasons")


def show(result: Comparison) -> None:
    """Print the result before it is written, so that a full disk does not lose it."""
    click.echo("\n".join([result.table(), "", result.reading, *result.notes(), result.conditions()]))
