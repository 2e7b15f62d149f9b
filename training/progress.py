"""Saying what takes long. Standard library and tqdm."""

from __future__ import annotations

import sys

from tqdm import tqdm

NOTED: set[str] = set()


def say(phase: str) -> None:
    """Name the phase that begins on stderr, where that is a terminal: as progress bars do, which show nothing yet."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"{phase} ...\n")
        sys.stderr.flush()


def note_once(text: str) -> None:
    """One line on stderr about the user's files; a verb that reads them several times says it once."""
    if text not in NOTED and sys.stderr is not None:
        NOTED.add(text)
        tqdm.write(f"note: {text}", file=sys.stderr)
