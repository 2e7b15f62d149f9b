"""`dmpt-export card`: measured figures on a model's card."""

from __future__ import annotations

from typing import Any

import click

from dmpt_export.requests.card import CardRequest


@click.command("card", short_help="Put a comparison's figures on a model's card.")
@click.argument("model")
@click.argument("comparison", type=click.Path())
@click.option("--row", metavar="NAME",
              help="The model's name in the comparison. Default: the row whose folder MODEL is.")  # fmt: skip
def command(**fields: Any) -> None:
    """Write the figures of COMPARISON (a comparison.json, or the folder with it) on the card of the folder MODEL.

    README.md gets a table of size, quality with text and protocol, and speed, and the same figures of quality in its
    metadata, where a model hub reads them (model-index). Figures written before are replaced; the rest stays.
    Figures of a model with another size or scheme are refused.

    \b
    Example:
      dmpt-export compare gpt2-device device --data wiki.test.raw --out report
      dmpt-export card device report
    """
    request = CardRequest(**fields)
    click.echo(f"Written to {request.run(request.check())}", err=True)
