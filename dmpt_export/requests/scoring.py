"""Checks for scoring a model on a text before a large model or torch is loaded; for eval and compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmpt_export.requests.sources import check_model, check_tokenizer, is_exported
from training.errors import usage


@dataclass(frozen=True)
class Windows:
    """How a text is cut into windows; see benchmarks.quality.protocols."""

    protocol: str
    max_length: int | None  # window length in tokens
    stride: int | None  # predictions scored in each

    def check(self) -> None:
        """Raise OptionError for windows that are wrong for any model."""
        from benchmarks.quality.protocols import LONGEST_WINDOW

        with usage():
            self.check_context(max(self.max_length or 0, LONGEST_WINDOW))

    def check_context(self, context: int) -> None:
        """Raise FieldError for windows that are impossible with this context, in tokens."""
        from benchmarks.quality.protocols import choose_windows

        choose_windows(context, self.max_length, self.stride, self.protocol)


def check_places(data: Sequence[str], folders: Sequence[str]) -> None:
    """Raise InputError for texts that are not there and for folders that cannot be made."""
    from training.checkpoints.places import check_place
    from training.text.sources import check_source

    for text in data:
        check_source(text)
    for folder in folders:
        check_place(Path(folder))


def check_scored(source: str, windows: Windows, mode: str | None = None, fast_k: int | None = None) -> None:
    """Raise InputError for a model that cannot be scored in these windows, in this path mode, with this fast_k."""
    from runtime.manifest_file import read_manifest

    if is_exported(source):
        windows.check_context(read_manifest(Path(source)).config.n_positions)
        return
    shape = check_model(source)
    windows.check_context(shape.n_positions)
    if mode is not None:
        shape.leaves_of_mode(mode)
    if fast_k is not None:
        shape.fast_k = fast_k or None
        shape.check()
    check_tokenizer(source, shape.vocab_size)
