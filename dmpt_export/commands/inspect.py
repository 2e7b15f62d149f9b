"""`dmpt-export inspect`: what a model is made of."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dmpt_export.extras import require


@click.command("inspect", short_help="Show a model's tree, parts, sizes and bits.")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(model: str, as_json: bool) -> None:
    """Show what MODEL is made of: the tree of paths, and parameters, bytes and bits of each part.

    MODEL is a DMPT folder, a quantized folder, an ONNX folder, or a GPT-2 folder or hub id; an ONNX folder
    is read without torch.

    \b
    Example:
      dmpt-export inspect device
    """
    if not (Path(model) / "dmpt_manifest.json").is_file():
        require("train")
    from dmpt_export.summary import as_text, summarise

    summary = summarise(model)
    click.echo(json.dumps(summary) if as_json else as_text(summary))
