"""`accelerate launch -m training MODEL OUT --data FILE`: `dmpt-export train` in several processes."""

from __future__ import annotations

import sys

import click

from training.cli.command import run
from training.cli.parameters import parameters


@click.pass_context
def callback(context: click.Context, /, **values: object) -> None:
    explicit = {n for n in values if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE}
    run(values, explicit)


def main() -> int:
    """Run the command line; errors meant for the user become one line and their exit code."""
    settings = {"token_normalize_func": lambda name: name.replace("_", "-")}
    command = click.Command("training", context_settings=settings, params=parameters(), callback=callback)
    try:
        command.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if type(code) is not int:
            raise
        click.echo(f"Error: {error}", err=True)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
