"""`dmpt-export page`: a static page that loads a model and writes."""

from __future__ import annotations

from typing import Any

import click

from dmpt_export.cli.checks import overwrite
from dmpt_export.requests.page import PageRequest


@click.command("page", short_help="Make a web page that runs a model in the browser.")
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option("--modules", metavar="FOLDER", default=PageRequest.modules, show_default=True,
              help="node_modules with onnxruntime-web and @huggingface/tokenizers.")  # fmt: skip
@overwrite
def command(**fields: Any) -> None:
    """Write the folder OUT: a page that loads the exported MODEL, keeps it in the browser, and writes text.

    Exports of --target web are the fastest in a browser; others for the CPU run there, too.

    Everything that the page needs lies beside it, so any server of static files can give it out. Tokens are
    colored by their path; the pointer on a token shows the weights of its heads. A download that was cut off
    continues where the server knows byte ranges.

    \b
    Example:
      npm install onnxruntime-web @huggingface/tokenizers
      dmpt-export onnx tuned device --target web
      dmpt-export page device site
      python -m http.server --directory site
    """
    request = PageRequest(**fields)
    request.run(request.check())
    trial = f"python -m http.server --directory {request.out}"
    click.echo(f"Written to {request.out}: put it on a server, or try `{trial}`", err=True)
