"""What several verbs refuse in their first second, before torch or ONNX is imported.

Errors of two kinds: what the command line alone tells is wrong usage (exit code 2); what takes a look at files is bad
input (3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from training.model.shape import Shape


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
        raise click.UsageError(str(error)) from error


def is_exported(source: str) -> bool:
    """Whether it is an ONNX folder, which needs no torch."""
    return (Path(source) / "dmpt_manifest.json").is_file()


def check_model(source: str) -> Shape:
    """What a checkpoint, float or quantized, or a hub id is. Raises InputError where there is none."""
    from training.checkpoints.files import resolve
    from training.checkpoints.folder import read_shape, tensor_files

    folder = resolve(source)
    shape = read_shape(folder)
    tensor_files(folder)
    return shape


def check_tokenizer(source: str, vocab_size: int | None = None) -> None:
    """Raise InputError when a folder or hub id has no tokenizer, a damaged one, or one of another model."""
    from training.checkpoints.files import TOKENIZER_FILES, resolve
    from training.text.tokenizer import load_tokenizer
    from training.text.windows import check_vocabulary

    folder = resolve(source, TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder)
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, folder)
