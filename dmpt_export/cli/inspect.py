"""`dmpt-export inspect`: show the parts of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dmpt_export.extras import require
from dmpt_export.requests.sources import check_model, is_exported


@click.command("inspect", short_help="Show a model's tree, parts, sizes and bits.")
@click.argument("model")
@click.option("--data", metavar="FILE", help="Text to measure path usage and head weights on.")
@click.option("--all", "full", is_flag=True, help="Show each tensor and operator too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with everything.")
def command(model: str, data: str | None, full: bool, as_json: bool) -> None:
    """Show the parts of MODEL: the tree of paths, parameters, bytes and bits of each part, and how much is stored in
    which form; with --all each tensor and, for an ONNX folder, its operators; with --data also path usage and head
    weights on a text's first 4096 tokens.

    MODEL is a DMPT folder, a quantized folder, an ONNX folder, or a GPT-2 folder or hub id; an ONNX folder
    is read without torch.

    \b
    Example:
      dmpt-export inspect device --data test.txt
    """
    exported = is_exported(model)
    require(*([] if exported else ["train"]), *(["cpu"] if exported and data is not None else []))
    if data is not None:
        from training.text.sources import check_source

        check_source(data)
    if not exported:
        from training.progress import say

        check_model(model)
        say("loading PyTorch")
    from dmpt_export.inspect.summary import as_text, summarise, usage_lines

    summary = summarise(model)
    used = follow(model, data) if data is not None else None
    if as_json:
        click.echo(json.dumps({**summary, "usage": used} if used else summary))
    else:
        click.echo("\n".join([as_text(summary, full=full), *(["", *usage_lines(used)] if used else [])]))


def follow(model: str, text: str) -> dict[str, Any]:
    """benchmarks.quality.path_usage of a model on a text."""
    from benchmarks.quality.open_scorer import open_scorer
    from benchmarks.quality.path_usage import MOST, usage
    from training.text.windows import check_vocabulary, first_tokens

    scorer = open_scorer(model)
    try:
        check_vocabulary(scorer.tokenizer, scorer.vocab_size, scorer.folder)
        return usage(scorer, first_tokens(Path(text), scorer.tokenizer, scorer.end_of_text, MOST))
    finally:
        scorer.close()
