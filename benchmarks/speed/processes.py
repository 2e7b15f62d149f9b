"""The parent's side of `benchmarks.speed.worker` processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # folder that contains the package benchmarks
INSTALLED = ("site-packages", "dist-packages")  # folders that pip installs to


def short(line: str) -> str:
    """
    >>> short("a" * 100)[-3:], short(" b ")
    ('aa…', 'b')
    """
    line = line.strip()
    return line if len(line) <= 60 else f"{line[:60]}…"


class WorkerFailed(RuntimeError):
    """A model could not be measured; `exit_code` is the exit code of the error in its process."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Worker:
    """One process that answers requests."""

    def __init__(self, name: str, python: str | None = None) -> None:
        """python: the interpreter that runs it; None: this one.

        Raises WorkerFailed (3) when it does not exist, or would import this Python's packages beside benchmarks.
        """
        self.name = name
        if python not in (None, sys.executable) and ROOT.name in INSTALLED:
            raise WorkerFailed(f"{name}: peers need a checkout: {ROOT} also holds this Python's packages", 3)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            self.process = subprocess.Popen(
                [python or sys.executable, "-m", "benchmarks.speed.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the worker without a traceback
            )
        except OSError as error:
            raise WorkerFailed(f"{name}: {python} cannot be started ({error.strerror})", 3) from error

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its reply; WorkerFailed when it says error, or died."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self.death()
        try:
            reply: dict[str, Any] = json.loads(line)
            fine = isinstance(reply, dict)
        except ValueError:
            fine = False
        if not fine:
            self.process.kill()  # its further output could be mistaken for replies
            raise WorkerFailed(
                f"{self.name}: its Python prints {short(line)!r} instead of a reply: give the interpreter itself", 3
            )
        if "error" in reply:
            raise WorkerFailed(f"{self.name}: {reply['error']}", reply["exit_code"])
        return reply

    def death(self) -> WorkerFailed:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return WorkerFailed(f"the process of {self.name} was killed: memory probably ran out", 5)
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return WorkerFailed(f"the process of {self.name} {end}: see its message above", 1)

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            self.process.stdout.close()


@contextmanager
def worker(name: str, python: str | None = None) -> Iterator[Worker]:
    w = Worker(name, python)
    try:
        yield w
    except BaseException:  # also Ctrl-C: do not wait for a long request
        w.process.kill()
        raise
    finally:
        w.close()
