"""Build the request of `dmpt-export train` from its parameters (training.cli.parameters), and print its result."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from training.cli.request import TrainRequest
from training.loop.options import TrainOptions

if TYPE_CHECKING:
    from training.loop.trainer import TrainResult


def run(context: click.Context) -> None:
    """Train by the parameters of `context`."""
    request = request_of(context)
    trained = request.run(request.check())
    if trained.main:
        click.echo(report(trained.result), err=True)
    leave_group()


def leave_group() -> None:
    """End the threads of a run in several processes. One that still frees a tensor while Python shuts down aborts the
    process, and with it a run that was complete (https://github.com/pytorch/pytorch/pull/179291)."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def request_of(context: click.Context) -> TrainRequest:
    """The request. Raises UsageError when MODEL or OUT is given twice."""
    values = dict(context.params)
    options = {field.name: values.pop(field.name) for field in fields(TrainOptions)}
    given = frozenset(n for n in options if context.get_parameter_source(n) is ParameterSource.COMMANDLINE)
    places = [place for place in (values.pop("model_argument"), values.pop("out_argument")) if place is not None]
    new = values["from_scratch"] or values["resume"] is not None
    if values["model"] is None and places and not (new and values["out"] is None and len(places) == 1):
        values["model"] = str(places.pop(0))
    if values["out"] is None and places:
        values["out"] = Path(places.pop(0))
    if places:
        raise click.UsageError(f"'{places[0]}' is too much: --model and --out already give MODEL and OUT")
    return TrainRequest(**values, options=TrainOptions(**options), given=given)


def report(result: TrainResult) -> str:
    """The result in two lines."""
    from training.loop.watch import perplexity

    lines = f"{result.folder}: {result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s"
    if result.best_loss is not None:
        lines += f"; held-out perplexity {perplexity(result.best_loss):.2f} (of the best model, which is in OUT)"
    return f"{lines}\nnext: dmpt-export onnx {result.folder} DEVICE --scheme int8"
