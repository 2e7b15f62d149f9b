"""`dmpt-export inspect`: show the parts of a model."""

from __future__ import annotations

import json
from typing import Any

import click

from dmpt_export.cli.checks import overwrite
from dmpt_export.requests.inspect import Inspected, InspectRequest, draw


@click.command("inspect", short_help="Show a model's tree, parts, sizes and bits.")
@click.argument("model")
@click.option("--data", metavar="FILE", help="Text to measure path usage and head weights on.")
@click.option("--domain", multiple=True, metavar="NAME=FILE", help="Text of one domain: its paths and perplexity, as "
              "eval --domain on its first 4096 tokens.")  # fmt: skip
@click.option("--picture", type=click.Path(dir_okay=False), metavar="FILE.svg", help="Draw the domains to this file.")
@click.option("--all", "full", is_flag=True, help="Show each tensor and operator too.")
@overwrite
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with everything.")
def command(full: bool, as_json: bool, **fields: Any) -> None:
    """Show the parts of MODEL: the tree of paths, parameters, bytes and bits of each part, and how much is stored in
    which form; with --all each tensor and, for an ONNX folder, its operators; with --data also path usage and head
    weights on a text's first 4096 tokens; with --domain which paths each domain of text takes.

    MODEL is a DMPT folder, a quantized folder, an ONNX folder, or a GPT-2 folder or hub id; an ONNX folder
    is read without torch.

    \b
    Example:
      dmpt-export inspect device --data test.txt
      dmpt-export inspect tuned --domain code=code.txt --domain prose=prose.txt --picture paths.svg
    """
    request = InspectRequest(**fields)
    request.check()
    found = request.run()
    if as_json:
        more = {"usage": found.usage, "domains": {name: one.to_json() for name, one in found.domains.items()}}
        shown = {**found.summary, **{key: value for key, value in more.items() if value}}
        click.echo(json.dumps(shown, allow_nan=False))
    else:
        click.echo("\n\n".join(parts(found, full)))
    if request.picture is not None:  # last, so that a full disk does not lose the result
        draw(request.picture, found)


def parts(found: Inspected, full: bool) -> list[str]:
    """The result as paragraphs of text."""
    from dmpt_export.inspect.summary import as_text, usage_lines

    out = [as_text(found.summary, full=full)]
    if found.usage is not None:
        out.append("\n".join(usage_lines(found.usage)))
    if found.domains:
        from benchmarks.report.domains import domain_table

        out.append(domain_table(found.domains))
    return out
