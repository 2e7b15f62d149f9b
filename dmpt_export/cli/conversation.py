"""`dmpt-export run` on a terminal without a prompt: one prompt after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import click

from dmpt_export.requests.run import Loaded, RunRequest

HELP = "Enter a prompt; a line that ends in \\ continues. Ctrl-C stops a text, Ctrl-D leaves."


def converse(loaded: Loaded, request: RunRequest, answer: Callable[[str], None]) -> None:
    """Read prompts until the input ends. answer: shows what continues a prompt; Ctrl-C stops it."""
    from runtime.errors import RequestError

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    click.echo(HELP, err=True)
    while True:
        try:
            text = read_prompt()
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        if not text.strip():
            continue
        try:
            answer(text)
        except RequestError as error:
            click.echo(f"Error: {error}", err=True)
        except KeyboardInterrupt:
            pass
        click.echo()


def read_prompt() -> str:
    """One prompt of one or several lines. Raises EOFError at the end of the input."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("... "))
    return "\n".join(lines)
