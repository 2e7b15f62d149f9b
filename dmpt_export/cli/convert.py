"""`dmpt-export convert`: a .pt checkpoint -> checkpoint folder; or full heads -> projected ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dmpt_export.cli.checks import overwrite
from dmpt_export.requests.convert import ConvertRequest, as_list


@click.command("convert", short_help="Convert .pt checkpoints of the original project and nanoGPT, or a DMPT's heads.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tokenizer", metavar="SOURCE",
              help="Folder or hub id to copy the tokenizer from; the original project used gpt2.")  # fmt: skip
@click.option("--head-allocation", type=click.Path(path_type=Path), metavar="FILE.json",
              help="Heads of each leaf, as given in training. Only needed if neither the .pt file nor the head gates "
              "show them.")  # fmt: skip
@click.option("--n-head", type=click.IntRange(min=1), metavar="N",
              help="Attention heads per block. Default: from the .pt file, else width / 64 as in every "
              "GPT-2.")  # fmt: skip
@click.option("--heads", type=click.Choice(["projected"]),
              help="SOURCE is a DMPT folder: replace the vocabulary matrix of each head that is not an anchor by a "
              "small matrix in front of its anchor's, fitted on --calib.")  # fmt: skip
@click.option("--head-rank", type=click.IntRange(min=1), metavar="R",
              help="Rank of those small matrices. Default: whole matrices.")  # fmt: skip
@click.option("--calib", metavar="FILE", type=click.Path(),
              help="Calibration text for --heads, typical of the model's input. The last quarter is held out to "
              "measure KL and perplexity.")  # fmt: skip
@click.option("--calib-tokens", type=click.IntRange(min=2), default=32768, show_default=True,
              help="Number of calibration tokens to use. More tokens give a closer fit and take longer.")  # fmt: skip
@overwrite
def command(**fields: Any) -> None:
    """Convert SOURCE to a checkpoint in the folder OUT.

    SOURCE is a .pt checkpoint of the original DMPT project or of nanoGPT. Dual path, quad path and several heads on one
    path are recognised by their tensor names; sizes and splits come from the tensors. The file is read by torch's
    weights-only loader, which runs no code from it. Tensors that do not belong to a DMPT are an error that lists all
    their names.

    With --heads projected, SOURCE is a DMPT folder with several heads per leaf. OUT is the same model with projected
    heads: smaller, and close in its predictions. KL and perplexity on text held out from the fit show how close.

    \b
    Examples:
      dmpt-export convert checkpoint_epoch_0_step_120000.pt dmpt --tokenizer gpt2
      dmpt-export convert out/ckpt.pt my-gpt --tokenizer gpt2                       nanoGPT
      dmpt-export convert tuned small --heads projected --calib train.txt

    \b
    Next:
      dmpt-export eval OUT --data wiki.test.raw
      dmpt-export onnx OUT device --scheme int8
    """
    request = ConvertRequest(**fields)
    made = request.run(request.check())
    shape = made.shape
    leaves = ", ".join(f"{leaf} {shape.head_allocation[leaf]}" for leaf in shape.leaves)
    click.echo(f"{request.out}: {made.parameters:,} parameters, splits {shape.splits}, heads {leaves}", err=True)
    click.echo(as_list(made.notes), err=True, nl=False)
    if request.heads is None and request.tokenizer is None:
        click.echo("no tokenizer was copied: give --tokenizer to evaluate and run the model", err=True)
