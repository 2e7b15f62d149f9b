"""Progress messages for long work. Standard library and tqdm."""

from __future__ import annotations

import sys

from tqdm import tqdm

NOTED: set[str] = set()


def say(phase: str) -> None:
    """Print the name of a starting phase on stderr if that is a terminal, before any progress bar shows."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"{phase} ...\n")
        sys.stderr.flush()


def tell(text: str) -> None:
    """One line on stderr, between progress bars."""
    if sys.stderr is not None:
        tqdm.write(text, file=sys.stderr)


def note_once(text: str) -> None:
    """Print one line on stderr about the user's files, only once even if a verb reads them several times."""
    if text not in NOTED and sys.stderr is not None:
        NOTED.add(text)
        tell(f"note: {text}")
