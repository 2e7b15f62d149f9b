"""Map the fields of a request to command-line flags."""

from __future__ import annotations

from collections.abc import Iterable

import click

from training.errors import FieldError, OptionError


def flags_of(parameters: Iterable[click.Parameter]) -> dict[str, str]:
    """The command-line name of each field: its first long option, or an argument's metavar.

    >>> flags_of([click.Option(["-n", "--most", "most_tokens"]), click.Argument(["models"], metavar="MODEL...")])
    {'most_tokens': '--most', 'models': 'MODEL'}
    """
    names = {}
    for parameter in parameters:
        name = parameter.name or ""
        long = [option for option in parameter.opts if option.startswith("--")]
        names[name] = long[0] if long else (parameter.metavar or name.upper()).strip("[].")
    return names


def parse_splits(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """`6,9` -> [6, 9]; `none` -> []; nothing -> None."""
    if text is None or not text.strip():
        return None
    if text.strip().lower() == "none":
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither a list of block indices such as 6 or 6,9 nor 'none'", context, parameter
        ) from None


def as_click_error(error: FieldError, context: click.Context) -> click.ClickException:
    """The error with the flags of `context`'s command, and with its usage if that was wrong."""
    message = error.with_flags(flags_of(context.command.get_params(context)))
    return click.UsageError(message, context) if isinstance(error, OptionError) else click.ClickException(message)
