"""Saying what takes long. Standard library only."""

from __future__ import annotations

import sys


def say(phase: str) -> None:
    """Name the phase that begins on stderr, where that is a terminal: as progress bars do, which show nothing yet."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"{phase} ...\n")
        sys.stderr.flush()
