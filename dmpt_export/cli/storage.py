"""Options that say how weights are stored, shared by `quantize` and `onnx`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import click

from dmpt_export.cli.checks import TableChoice

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def schemes() -> Iterable[str]:
    from quant.schemes import SCHEMES

    return SCHEMES


def row_schemes() -> Iterable[str]:
    from quant.rules import row_schemes

    return row_schemes()


def deltas() -> Iterable[str]:
    """Delta schemes, which are only for rules; the request's check reports that."""
    from quant.schemes.low_rank import DELTAS

    return DELTAS


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 200MB, 1.5GB, 190MiB, 200000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+\.?\d*)\s*([A-Za-z]*)", str(value).strip())
        if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
            self.fail(f"'{value}' is not a size: give one such as 200MB, 1.5GB or 190MiB.", param, ctx)
        return int(float(found[1]) * UNITS[found[2].upper()])


def number(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else int(value)


OPTIONS = [
    click.option(
        "--scheme",
        type=TableChoice("scheme", schemes, deltas),
        help="How to store weights; `dmpt-export quantize --help` describes each.",
    ),
    click.option(
        "--vocab-scheme",
        type=TableChoice("scheme", row_schemes),
        help="Another one for the embedding and the vocabulary matrices. Default: --scheme's, or int8 beside nf4, fp4 "
        "and int8-dynamic.",
    ),
    click.option(
        "--block",
        type=click.Choice(["16", "32", "64", "128", "256"]),
        callback=number,
        help="Weights that share a scale: "
        "fewer give smaller errors and larger files. Default: 128 for int8, 64 for int2, nf4 and fp4, "
        "else 32.",
    ),
    click.option(
        "--asymmetric", is_flag=True, help="Also store a zero point per block: smaller errors, slightly larger."
    ),
    click.option(
        "--rule",
        "--layer-bits",
        "rules",
        metavar="PATTERN=SCHEME[:BLOCK][:asymmetric]",
        multiple=True,
        help="Another scheme, or float32, for matching tensor names; may be repeated, the first match wins. "
        "A number of bits means the scheme of that width, with --calib GPTQ's.",
    ),
    click.option(
        "--target-size",
        type=Size(),
        help="Plan: least damage within this size of the weights' file, such as 200MB; graph and tokenizer are extra.",
    ),
    click.option(
        "--plan",
        metavar="PLAN.json",
        type=click.Path(),
        help="Use the rules of an earlier plan. "
        "Its gptq parts need --calib again, and only give the same bytes with the same text.",
    ),
]


def storage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds OPTIONS to a command, in their order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
