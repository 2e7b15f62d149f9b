"""`accelerate launch -m training MODEL OUT --data FILE`: `dmpt-export train` in several processes."""

from __future__ import annotations

import sys

import click

from training.cli.command import run
from training.cli.flags import as_click_error
from training.cli.parameters import parameters
from training.errors import FieldError

BAD_INPUT = 3


@click.pass_context
def callback(context: click.Context, /, **_fields: object) -> None:
    run(context)


def main() -> int:
    """Run the command line; errors meant for the user become one line and their exit code."""
    settings = {"token_normalize_func": lambda name: name.replace("_", "-")}
    command = click.Command("training", context_settings=settings, params=parameters(), callback=callback)
    try:
        with command.make_context("training", sys.argv[1:]) as context:
            try:
                command.invoke(context)
            except FieldError as error:
                raise as_click_error(error, context) from error
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except Exception as error:
        code = BAD_INPUT if isinstance(error, click.ClickException) else getattr(error, "exit_code", None)
        if type(code) is not int:
            raise
        click.echo(f"Error: {error}", err=True)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
