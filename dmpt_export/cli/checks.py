"""Parameters of several verbs, and errors that are about the command line alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click


class Finite(click.FloatRange):
    """A number in a range; click lets NaN and infinity through."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def skip_verification(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    if value:
        from training.checkpoints.folder import unverified

        context.with_resource(unverified())
    return value


no_verify = click.option("--no-verify", is_flag=True, expose_value=False, callback=skip_verification,
                         help="Do not compare a GPT-2 folder with Transformers when it is first read.")  # fmt: skip


@contextmanager
def usage() -> Iterator[None]:
    """Errors that are meant for people, raised inside, are about the command line alone: wrong usage."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not hasattr(error, "exit_code"):
            raise
        from training.errors import FieldError, OptionError

        if isinstance(error, FieldError):
            raise OptionError(error.message, *error.values) from error
        raise click.UsageError(str(error)) from error
