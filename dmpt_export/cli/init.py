"""`dmpt-export init`: GPT-2 -> DMPT checkpoint, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dmpt_export.cli.checks import Finite, no_verify, overwrite
from dmpt_export.requests.init import InitRequest


def parse_splits(context: click.Context, parameter: click.Parameter, text: str) -> list[int] | None:
    from training.cli.flags import parse_splits as parse

    return parse(context, parameter, text)


@click.command("init", short_help="Make a DMPT checkpoint from a GPT-2, without training.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--splits", default="", callback=parse_splits, metavar="LIST",
              help="Block indices where every path splits in two: 6 (dual), 6,9 (quad); none for several heads on one "
              "path. Default: half the depth.")  # fmt: skip
@click.option("--heads", type=click.IntRange(min=1), metavar="N",
              help="Total vocabulary heads, divided evenly. Default: 4 per leaf, at most 8 in total.")  # fmt: skip
@click.option("--head-allocation", type=click.Path(path_type=Path), metavar="FILE.json",
              help='The heads of each leaf instead: {"left": [0, 1], "right": [2, 3]}; the first is the '
              "leaf's anchor.")  # fmt: skip
@click.option("--fast-k", type=click.IntRange(min=1), metavar="K",
              help="Candidates that the heads besides the anchor score when deployed. Default: the whole "
              "vocabulary; 256 is a good start.")  # fmt: skip
@click.option("--head-topk", type=click.IntRange(min=1), metavar="H",
              help="Heads mixed per token. Default: all of the leaf.")  # fmt: skip
@click.option("--head-kind", type=click.Choice(["projected", "full"]), default="projected", show_default=True,
              help="What the heads besides the anchors are: projected, a small matrix in front of their anchor; full, "
              "a vocabulary matrix each (38.6 M parameters instead of 0.6 M in GPT-2 small).")  # fmt: skip
@click.option("--head-rank", type=click.IntRange(min=1), metavar="R",
              help="Rank of projected heads. Default: whole matrices.")  # fmt: skip
@click.option("--shared-anchor/--no-shared-anchor", default=None,
              help="Projected heads only: one vocabulary matrix for all leaves, so that the anchors of the other "
              "leaves are projected too, or one for each. Default: one for all.")  # fmt: skip
@click.option("--next-tokens", type=click.IntRange(min=1), metavar="N",
              help="Draft heads of each leaf: they predict N tokens after the next one, so that a device can check "
              "several tokens in one run (run --speculate). Default: none.")  # fmt: skip
@click.option("--noise", type=Finite(min=0), default=1e-3, show_default=True, metavar="STD",
              help="Noise on the heads besides the anchors, in standard deviations of the embedding; a projected "
              "head changes its input by ten times this share.")  # fmt: skip
@click.option("--gate-bias", type=Finite(-100, 100), default=0.25, show_default=True, metavar="LOGITS",
              help="Initial bias of every gate towards the left path, in logits.")  # fmt: skip
@click.option("--gate-hidden", type=click.IntRange(min=1), default=256, show_default=True, metavar="N",
              help="Hidden width of gates and head gates.")  # fmt: skip
@click.option("--tie/--no-tie", default=None,
              help="Share head 0 with the embedding (saves memory) or copy it. Default: as in SOURCE.")  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of noise and gates."
)
@no_verify
@overwrite
def command(**fields: Any) -> None:
    """Turn the GPT-2 SOURCE (a folder or a hub id) into a DMPT checkpoint in the folder OUT.

    Above each split, both paths start as copies of GPT-2's blocks, and every vocabulary head as a copy of its head or
    as a projection in front of one, so the new model predicts what GPT-2 predicted, up to --noise. Training then lets
    the copies differ.

    \b
    Examples:
      dmpt-export init gpt2 dmpt                          split at half depth, 4 heads per path
      dmpt-export init ./my-gpt2 quad --splits 6,9 --heads 8 --fast-k 256
      dmpt-export init gpt2 many-heads --splits none --heads 4

    \b
    Next:
      dmpt-export train OUT tuned --recipe deployed --data text.txt
    """
    request = InitRequest(**fields)
    made = request.run(request.check())
    out, shape = request.out, made.shape
    if not made.has_tokenizer:
        click.echo(f"{request.source} has no tokenizer, so {out} has none: training on text needs one", err=True)
    mixed = any(len(heads) > 1 for heads in shape.head_allocation.values())
    fast_k = f" --fast-k {min(256, shape.vocab_size)}" if mixed and not shape.fast_k else ""
    leaves = ", ".join(f"{leaf} {shape.head_allocation[leaf]}" for leaf in shape.leaves)
    kind = shape.head_kind if shape.projected_heads else "full"
    click.echo(
        f"{out}: {made.parameters:,} parameters, splits {shape.splits}, {kind} heads {leaves}; "
        f"next: dmpt-export train {out} TUNED --recipe deployed{fast_k} --data TEXT",
        err=True,
    )
