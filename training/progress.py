"""Progress messages for long work. Standard library and tqdm."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

NOTED: set[str] = set()
EVERY_S = 30.0  # between lines of progress where stderr is not a terminal
LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {rate_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar on a terminal. Elsewhere (a log file) a line every EVERY_S seconds, and none for short work."""

    def __init__(self, *arguments: Any, disable: bool | None = None, **options: Any) -> None:
        """As tqdm's; disable: True shows nothing."""
        self.lines = sys.stderr is not None and not sys.stderr.isatty()
        self.shown = time.monotonic()
        if self.lines:
            options |= {"bar_format": LINE, "mininterval": EVERY_S, "maxinterval": EVERY_S, "leave": False}
        options["disable"] = bool(disable) if self.lines else disable
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.lines:
            super().display(msg, pos)
            return
        if self.n > self.initial and time.monotonic() - self.shown >= EVERY_S:
            self.shown = time.monotonic()
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        if not self.lines:
            super().clear(nolock)

    def close(self) -> None:
        if not self.lines:
            super().close()
        elif not self.disable:
            self.disable = True
            with self.get_lock():
                self._decr_instances(self)  # type: ignore[attr-defined]


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
