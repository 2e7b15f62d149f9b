"""Parameters shared by several verbs, and errors of the command line alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import click


class Finite(click.FloatRange):
    """A number in a range; click lets NaN and infinity through."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class TableChoice(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A choice among the entries of a table, which is imported only when it is needed."""

    def __init__(self, name: str, table: Callable[[], Iterable[str]], besides: Callable[[], Iterable[str]] = tuple):
        """besides: further accepted values, which are not listed."""
        self.name = name
        self.table = table
        self.besides = besides

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.table())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        known = list(self.table())
        if value not in known and value not in self.besides():
            self.fail(f"'{value}' is not one of {', '.join(known)}.", param, ctx)
        return str(value)


def protocols() -> Iterable[str]:
    from benchmarks.quality.protocols import PROTOCOLS

    return PROTOCOLS


def skip_verification(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    if value:
        from training.checkpoints.folder import unverified

        context.with_resource(unverified())
    return value


overwrite = click.option("--overwrite", is_flag=True, help="Replace an earlier result.")
no_verify = click.option("--no-verify", is_flag=True, expose_value=False, callback=skip_verification,
                         help="Do not compare a GPT-2 folder with Transformers when it is first read.")  # fmt: skip
