"""`dmpt-export convert`: a checkpoint of the original DMPT project -> checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import click

from dmpt_export.cli.checks import overwrite as overwrite_option
from dmpt_export.extras import require
from dmpt_export.requests.sources import check_tokenizer


@click.command("convert", short_help="Convert a .pt checkpoint of the original DMPT project, or nanoGPT's.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tokenizer", metavar="SOURCE",
              help="Folder or hub id to copy the tokenizer from; the original project used gpt2.")  # fmt: skip
@click.option("--head-allocation", type=click.Path(path_type=Path), metavar="FILE.json",
              help="Heads of each leaf, as given in training. Only needed if neither FILE nor the head gates "
              "show them.")  # fmt: skip
@click.option("--n-head", type=click.IntRange(min=1), metavar="N",
              help="Attention heads per block. Default: from FILE, else width / 64 as in every GPT-2.")  # fmt: skip
@overwrite_option
def command(
    file: Path, out: Path, tokenizer: str | None, head_allocation: Path | None, n_head: int | None, overwrite: bool
) -> None:
    """Convert FILE, a .pt checkpoint of the original DMPT project or of nanoGPT, to a checkpoint in the folder OUT.

    Dual path, quad path and several heads on one path are recognised by their tensor names; sizes and splits
    come from the tensors. FILE is read by torch's weights-only loader, which runs no code from it. Tensors that do
    not belong to a DMPT are an error that lists all their names.

    \b
    Examples:
      dmpt-export convert checkpoint_epoch_0_step_120000.pt dmpt --tokenizer gpt2
      dmpt-export convert out/ckpt.pt my-gpt --tokenizer gpt2                       nanoGPT

    \b
    Next:
      dmpt-export eval OUT --data wiki.test.raw
      dmpt-export onnx OUT device --scheme int8
    """
    require("train")
    from training.checkpoints.files import check_pt
    from training.checkpoints.folder import read_head_allocation
    from training.checkpoints.places import check_inputs, check_new
    from training.progress import say

    check_new(out, "checkpoint", overwrite)
    check_inputs(out, file, tokenizer, head_allocation)
    check_pt(file)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    allocation = None if head_allocation is None else read_head_allocation(head_allocation)

    say("loading PyTorch")
    from training.checkpoints.checkpoint import model_from_tensors, save_model
    from training.checkpoints.original import read_original

    checkpoint, notes = read_original(file, allocation, n_head)
    model = model_from_tensors(checkpoint.config, checkpoint.tensors)
    save_model(model, out, tokenizer_from=tokenizer, card=f"Converted from `{file.name}`.\n\n" + as_list(notes))
    config = checkpoint.config
    leaves = ", ".join(f"{leaf} {config.head_allocation[leaf]}" for leaf in config.leaves)
    click.echo(f"{out}: {model.num_parameters():,} parameters, splits {config.splits}, heads {leaves}", err=True)
    click.echo(as_list(notes), err=True, nl=False)
    if tokenizer is None:
        click.echo("no tokenizer was copied: give --tokenizer to evaluate and run the model", err=True)


def as_list(notes: list[str]) -> str:
    """A Markdown list, also readable in a terminal."""
    return "".join(f"- {note}\n" for note in notes)
