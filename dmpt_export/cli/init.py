"""`dmpt-export init`: GPT-2 -> DMPT checkpoint, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dmpt_export.cli.checks import Finite, no_verify
from dmpt_export.cli.extras import require


def parse_splits(ctx: click.Context, option: click.Parameter, text: str) -> list[int] | None:
    """`6,9` -> [6, 9]; `none` -> []; nothing -> None, which means half depth."""
    if not text.strip():
        return None
    if text.strip().lower() == "none":
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of block indices such as 6 or 6,9, nor 'none'") from None


@click.command("init", short_help="Make a DMPT checkpoint from a GPT-2, without training.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--splits", default="", callback=parse_splits, metavar="LIST",
              help="Block indices where every path forks in two: 6 (dual), 6,9 (quad); none for several heads on one "
              "path. Default: half the depth.")  # fmt: skip
@click.option("--heads", type=click.IntRange(min=1), metavar="N",
              help="Vocabulary heads in all, shared out evenly. Default: 4 a leaf, at most 8 in all.")  # fmt: skip
@click.option("--head-allocation", type=click.Path(path_type=Path), metavar="FILE.json",
              help='Which heads belong to which leaf instead: {"left": [0, 1], "right": [2, 3]}; the first is the '
              "leaf's anchor.")  # fmt: skip
@click.option("--fast-k", type=click.IntRange(min=1), metavar="K",
              help="Candidates that the heads besides the anchor are scored on when deployed. Default: the whole "
              "vocabulary; 256 is a good start.")  # fmt: skip
@click.option("--head-topk", type=click.IntRange(min=1), metavar="H",
              help="Heads mixed per token. Default: all of the leaf.")  # fmt: skip
@click.option("--noise", type=Finite(min=0), default=1e-3, show_default=True, metavar="STD",
              help="Noise on the heads that are no anchor, in standard deviations of the embedding.")  # fmt: skip
@click.option("--gate-bias", type=Finite(-100, 100), default=0.25, show_default=True, metavar="LOGITS",
              help="Head start of the left path in every gate, in logits.")  # fmt: skip
@click.option("--gate-hidden", type=click.IntRange(min=1), default=256, show_default=True, metavar="N",
              help="Hidden width of gates and head gates.")  # fmt: skip
@click.option("--tie/--no-tie", default=None,
              help="Whether head 0 is the embedding (saves its memory) or a copy. Default: as in SOURCE.")  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of noise and gates."
)
@no_verify
def command(
    source: str,
    out: Path,
    splits: list[int] | None,
    heads: int | None,
    head_allocation: Path | None,
    fast_k: int | None,
    head_topk: int | None,
    noise: float,
    gate_bias: float,
    gate_hidden: int,
    tie: bool | None,
    seed: int,
) -> None:
    """Turn the GPT-2 SOURCE (a folder or a hub id) into a DMPT checkpoint in the folder OUT.

    Above each split, both paths start as copies of GPT-2's blocks, and every vocabulary head as a copy of its
    head, so the new model predicts what GPT-2 predicted, within --noise. What the copies become is up to
    training.

    \b
    Examples:
      dmpt-export init gpt2 dmpt                          split at half depth, 4 heads a path
      dmpt-export init ./my-gpt2 quad --splits 6,9 --heads 8 --fast-k 256
      dmpt-export init gpt2 many-heads --splits none --heads 4

    \b
    Next:
      dmpt-export train OUT tuned --data text.txt
    """
    if heads is not None and head_allocation is not None:
        raise click.UsageError("--heads and --head-allocation exclude each other: the file already names every head")
    require("train")
    from training.checkpoints.atomic import check_inputs, check_replaceable
    from training.checkpoints.folder import float_folder, read_head_allocation, read_shape
    from training.model.shape import check_init
    from training.progress import say

    check_replaceable(out, "checkpoint")
    check_inputs(out, source, head_allocation)
    shape: dict[str, Any] = {
        "splits": splits, "heads": heads, "fast_k": fast_k, "head_topk": head_topk, "gate_hidden": gate_hidden,
        "tie": tie, "head_allocation": None if head_allocation is None else read_head_allocation(head_allocation),
    }  # fmt: skip
    folder = float_folder(source)
    check_init(read_shape(folder), **shape).check_exportable()

    say("loading PyTorch")
    from training.checkpoints.checkpoint import load_model, save_model
    from training.model.init import init_from_gpt2

    model = init_from_gpt2(load_model(folder), **shape, noise=noise, gate_bias=gate_bias, seed=seed)
    name = Path(source).name
    save_model(model, out, tokenizer_from=folder, card=f"Initialised from `{name}` without training.")
    if not (out / "tokenizer.json").is_file():
        click.echo(f"{source} has no tokenizer, so {out} has none: training on text will need one", err=True)
    config = model.config
    leaves = ", ".join(f"{leaf} {config.head_allocation[leaf]}" for leaf in config.leaves)
    click.echo(
        f"{out}: {model.num_parameters():,} parameters, splits {config.splits}, heads {leaves}; "
        f"next: dmpt-export train {out} TUNED --data TEXT",
        err=True,
    )
