"""Checks shared by several verbs, run in the first second, before torch or ONNX is imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.model.shape import Shape


@contextmanager
def usage_of_runtime() -> Iterator[None]:
    """What the runtime refuses in here is an option of the command line: OptionError."""
    from runtime.errors import RequestError

    try:
        yield
    except RequestError as error:
        from training.errors import OptionError  # not at the top: a device has no training packages

        raise OptionError("{}", error) from error


def is_exported(source: str) -> bool:
    """Whether the source is an ONNX folder, which needs no torch."""
    return (Path(source) / "dmpt_manifest.json").is_file()


def check_model(source: str) -> Shape:
    """The shape of a float or quantized checkpoint or a hub id. Raises InputError for anything else."""
    from training.checkpoints.files import resolve
    from training.checkpoints.folder import read_shape, tensor_files

    folder = resolve(source)
    shape = read_shape(folder)
    tensor_files(folder)
    return shape


def is_quantized(source: str) -> bool:
    """Whether the source is a quantized checkpoint. Raises InputError for a folder or hub id that cannot be read."""
    from training.checkpoints.files import resolve
    from training.checkpoints.folder import read_fields

    _, fields = read_fields(resolve(source))
    return "quantization" in fields


def check_tokenizer(source: str, vocab_size: int | None = None) -> None:
    """Raise InputError when a folder or hub id has no tokenizer, a damaged one, or one that does not fit."""
    from training.checkpoints.files import TOKENIZER_FILES, resolve
    from training.text.tokenizer import load_tokenizer
    from training.text.windows import check_vocabulary

    folder = resolve(source, TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder)
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, folder)
