"""Handle Ctrl-C and SIGTERM as a request to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(RuntimeError):
    """Training stopped on request, after saving."""

    exit_code = 130


class StopRequest:
    """Records a signal that requests a stop. A second Ctrl-C stops at once, without saving."""

    name: str | None = None  # of the signal

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the body, in the main thread only; other threads cannot catch signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
