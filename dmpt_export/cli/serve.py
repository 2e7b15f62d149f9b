"""`dmpt-export serve`: OpenAI's completions over HTTP."""

from __future__ import annotations

import signal
from typing import Any

import click

from dmpt_export.cli.checks import Finite
from dmpt_export.requests.serve import KEY_VARIABLE, ServeRequest


@click.command("serve", short_help="Answer OpenAI's completions over HTTP, without torch.")
@click.argument("model")
@click.option("--host", default=ServeRequest.host, show_default=True, help="Address to listen on; 0.0.0.0: all of this "
              "machine, so that others can reach it. Give it an API key then.")  # fmt: skip
@click.option("--port", type=int, default=ServeRequest.port, show_default=True, help="0: a free one.")
@click.option("--name", help="What clients call the model. Default: the folder's name.")
@click.option("--api-key-file", metavar="FILE", help=f"Ask clients for a key: one of FILE's lines, or that of the "
              f"environment variable {KEY_VARIABLE}.")  # fmt: skip
@click.option("--cors-origin", metavar="ORIGIN", multiple=True, help="Let web pages of ORIGIN (https://host:port, or "
              "*) read answers in a browser. May be repeated. Default: none.")  # fmt: skip
@click.option("--allow-host", metavar="NAME", multiple=True, help="On the loopback address without a key: answer "
              "requests to NAME, too, for a proxy on this machine. May be repeated.")  # fmt: skip
@click.option("--parallel", type=click.IntRange(min=1), default=ServeRequest.parallel, show_default=True,
              help="Texts written together; each needs memory for keys and values.")  # fmt: skip
@click.option("--queue", type=click.IntRange(min=1), default=ServeRequest.queue, show_default=True,
              help="Texts that may wait for their turn. Beyond, clients get 429.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most new tokens of a text. Default: what the context "
              "holds.")  # fmt: skip
@click.option("--max-texts", type=click.IntRange(min=1), default=ServeRequest.max_texts, show_default=True,
              help="Most texts of one request: prompts times n.")  # fmt: skip
@click.option("--max-body", type=click.IntRange(min=1), default=ServeRequest.max_body, show_default=True,
              help="Most bytes of one request.")  # fmt: skip
@click.option("--max-connections", type=click.IntRange(min=1), default=ServeRequest.max_connections, show_default=True,
              help="Connections open at once.")  # fmt: skip
@click.option("--client-timeout", type=Finite(min=0.1), default=ServeRequest.client_timeout, show_default=True,
              help="Seconds in which a client must send its request, and take what waits for it.")  # fmt: skip
@click.option("--grace", type=Finite(min=0), default=ServeRequest.grace, show_default=True,
              help="Seconds that running texts have to end after SIGTERM or Ctrl-C.")  # fmt: skip
@click.option("--exact", is_flag=True, help="Write texts in turn instead of together: each is then bit by bit what it "
              "is alone, also where int8 kernels round several texts differently. Slower.")  # fmt: skip
@click.option("--threads", type=int, help="CPU threads. Default: all available to this process.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--no-check", is_flag=True, help="Do not compare the files' sha256 with the manifest.")
def command(**fields: Any) -> None:
    """Serve the exported folder MODEL: /v1/completions and /v1/models as OpenAI's, /health and /metrics.

    Texts of several clients are written together. Needs neither torch nor Transformers: the extras [cpu] and [serve]
    are enough. SIGTERM lets running texts end; the log names no text.

    \b
    Examples:
      dmpt-export serve device
      dmpt-export serve device --host 0.0.0.0 --port 80 --api-key-file keys.txt
      curl localhost:8080/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "The tide mill", "max_tokens": 40, "temperature": 0}'
    """
    request = ServeRequest(**fields)
    request.check()
    from runtime.server.connections import set_up_log

    set_up_log()
    if not request.is_local and not request.keys():
        click.echo(f"Warning: {request.host} can be reached from other machines, and no API key is set: everyone there "
                   f"can use the model. Set {KEY_VARIABLE} or --api-key-file.", err=True)  # fmt: skip
    ended_by = request.run(lambda at: click.echo(f"{request.served_name} is served at {at} (Ctrl-C ends)", err=True))
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt
