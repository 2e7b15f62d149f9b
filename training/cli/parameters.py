"""Arguments and options of `dmpt-export train`, in the order of its help."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from training.checkpoints.folder import unverified
from training.cli.flags import parse_splits
from training.cli.recipes import names
from training.loop.options import TrainOptions, flag
from training.model.shape import HEAD_KINDS

TYPES = {"int": int, "float": float, "str": str, "bool": bool}
# First option of each section of the help
SECTIONS = {
    "model": "Model, data and output",
    "splits": "Converting a GPT-2 to a DMPT first",
    "from_scratch": "Training from scratch",
    "epochs": "Training length",
    "lr": "Optimizer",
    "train_path_selection": "Training loss",
    "gate_temp": "Model settings",
    "freeze_head0_steps": "Freezing",
    "log_every": "Logging and saving",
    "bf16": "Machine",
}

# What `train --help` shows; --help-all shows all of them, with ABOUT each section.
COMMON = {
    "data", "eval_data", "tokenizer", "resume", "overwrite", "recipe", "splits", "heads", "from_scratch", "n_layer",
    "n_embd", "n_head", "n_positions", "epochs", "max_steps", "max_length", "batch_size", "seed", "lr", "head_lr",
    "eval_every", "save_every", "bf16",
}  # fmt: skip
ABOUT = {
    "Converting a GPT-2 to a DMPT first": "As `dmpt-export init`; nothing is converted without --splits, --heads, "
    "--head-kind, --next-tokens or a recipe that has them.",
    "Training from scratch": "A new GPT-2. Defaults then: --lr, --head-lr and --gate-lr 6e-4, --warmup-steps 200, "
    "--max-length the context, --freeze-head0-steps 0, --tether-coef 0.",
    "Optimizer": "Blocks, heads and gates have learning rates of their own. Small models need larger ones than these, "
    "which the original project chose for GPT-2 small.",
    "Training loss": "The loss is the mean negative log-likelihood plus coefficient times term for each term below; a "
    "coefficient of 0 leaves its term out. --lb-coef keeps both paths in use, --gold-aux-coef teaches gates which path "
    "predicts better, --domain-coef which path or heads serve a domain (--domain, --learn-domains), "
    "--switch-coef steadies routes, --next-tokens-coef trains draft heads, "
    "--tether-coef keeps paths near the GPT-2 they came from, --head-lb-coef and --head-entropy-coef keep all heads "
    "in use.",
    "Model settings": "Stored in the model; they change what it computes. --head-topk mixes only the heads with the "
    "largest weights.",
    "Freezing": "Frozen parameters keep their values. Head 0 is frozen at first, because it starts as GPT-2's own.",
    "Logging and saving": "OUT/metrics.jsonl gets a line per --log-every steps; OUT/last is what --resume continues.",
}


def parameters() -> list[click.Parameter]:
    """Arguments and options. Underscores and dashes in option names are equivalent."""
    path = click.Path(path_type=Path)
    size: dict[str, Any] = {"type": click.IntRange(min=1), "metavar": "N"}
    option = click.Option
    # fmt: off
    return [
        click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_help_all,
                     help="Show all options, with what they do, and exit."),
        click.Argument(["model_argument"], required=False, metavar="[MODEL]"),
        click.Argument(["out_argument"], required=False, type=path, metavar="[OUT]"),
        option(["--model", "--pretrained-model", "--init-from-dual", "model"], metavar="MODEL", help="Same as MODEL."),
        option(["--out", "--checkpoint-dir", "out"], type=path, metavar="OUT", help="Same as OUT."),
        option(["--data"], multiple=True, type=path, metavar="FILE",
               help="Text to train on: plain, JSONL (both also .xz, .gz, .zst), Parquet, or a hub dataset such as "
               "wikitext-103 or OWNER/NAME:CONFIG:SPLIT; may be repeated.  [wikitext-103]"),
        option(["--eval-data"], multiple=True, type=path, metavar="FILE",
               help="Held-out text, in the forms of --data; without it, no best model is kept."),
        option(["--domain"], multiple=True, metavar="NAME=FILE",
               help="Text to train on, like --data, with the name of its domain; may be repeated. Gates and head gates "
               "learn which path or heads serve it (--domain-coef)."),
        option(["--domain-map"], type=path, metavar="FILE.json",
               help='What serves each domain: {"code": "left", "prose": [4, 5]}, a path or heads. Default: the '
               "domains share out the paths, or the heads of a single path."),
        option(["--learn-domains"], type=click.IntRange(min=2), metavar="K",
               help="Find K domains in text without names before the first step, by k-means over the trunk's mean "
               "outputs, and teach them."),
        option(["--text-field"], metavar="NAME", help="Text field of JSONL, Parquet and datasets.  [text]"),
        option(["--tokenizer"], metavar="FOLDER", help="Tokenizer for --from-scratch, or instead of MODEL's own."),
        option(["--resume"], is_flag=False, flag_value="", metavar="[RUN]", help="Continue OUT, or the given run."),
        option(["--overwrite"], is_flag=True, help="Start a new run in OUT and delete the run that it holds."),
        option(["--recipe"], metavar="NAME",
               help=f"Settings and phases: {', '.join(names())} (see below), or a JSON file; options override them."),
        option(["--no-verify"], is_flag=True, expose_value=False, callback=_no_verify,
               help="Do not compare a GPT-2 folder with Transformers on first use."),
        option(["--cache-dir"], type=path, help="Cache folder of tokenised text.  [~/.cache/dmpt-export]"),
        option(["--splits", "--split-at-layer", "splits"], metavar="LIST", callback=parse_splits,
               help="As in init: 6, or 6,9, or none."),
        option(["--heads", "--n-lm-perceptrons", "heads"], **size, help="As in init: total vocabulary heads."),
        option(["--head-allocation"], type=path, metavar="FILE.json", help="As in init: the heads of each leaf."),
        option(["--head-kind"], type=click.Choice(HEAD_KINDS), help="As in init: full or projected heads."),
        option(["--head-rank"], **size, help="As in init: rank of projected heads."),
        option(["--shared-anchor"], is_flag=True, default=None, help="As in init: one matrix for all leaves."),
        option(["--next-tokens"], **size, help="As in init: draft heads of each leaf."),
        option(["--use-head-mixture/--no-use-head-mixture"], default=None, help="no: a single head per leaf."),
        option(["--gate-hidden"], **size, default=256, show_default=True, help="As in init: width of the gates."),
        option(["--from-scratch"], is_flag=True, help="Start from a new GPT-2 with random weights instead of MODEL; "
               "sets other defaults (see --help-all)."),
        option(["--n-layer"], **size, default=12, show_default=True, help="Number of its blocks."),
        option(["--n-embd"], **size, default=768, show_default=True, help="Its width."),
        option(["--n-head"], **size, default=12, show_default=True, help="Number of its attention heads."),
        option(["--n-positions"], **size, default=1024, show_default=True, help="Its context, in tokens."),
        *(_option(field) for field in fields(TrainOptions)),
    ]
    # fmt: on


def _help_all(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta["all options"] = True
        click.echo(context.get_help())
        context.exit()


def _no_verify(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.with_resource(unverified())


def _option(field: dataclasses.Field[Any]) -> click.Option:
    kind = TYPES[str(field.type).split(" ", 1)[0]]
    name = flag(field.name)
    aliases = ["--max-grad-norm"] if field.name == "clip_grad_norm" else []
    shown = {"show_default": field.default is not None and kind is not bool, "help": field.metadata["help"]}
    if kind is bool:
        return click.Option([name, field.name], is_flag=True, default=field.default, **shown)
    return click.Option([name, *aliases, field.name], type=kind, default=field.default, **shown)
