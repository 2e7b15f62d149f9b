"""The parent's side of `benchmarks.speed.worker` processes."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.progress import tell

ROOT = Path(__file__).resolve().parents[2]  # folder that contains the package benchmarks
INSTALLED = ("site-packages", "dist-packages")  # folders that pip installs to
OURS = ("benchmarks", "quant", "runtime", "training")  # packages that a worker may import
MOST_SHOWN = 4000  # last characters of a failed worker's standard error


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

        Its standard error is kept, and shown when it fails. Raises WorkerFailed (3) when there is no such interpreter.
        """
        self.name = name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (until close())
        alone = python not in (None, sys.executable) and ROOT.name in INSTALLED
        path = os.pathsep.join(filter(None, [str(our_packages() if alone else ROOT), os.environ.get("PYTHONPATH")]))
        try:
            self.process = subprocess.Popen(
                [python or sys.executable, "-m", "benchmarks.speed.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the worker without a traceback
            )
        except OSError as error:
            self.log.close()
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
            self.show_log()
            raise WorkerFailed(f"{self.name}: {reply['error']}", reply["exit_code"])
        return reply

    def show_log(self) -> None:
        """What the process wrote to its standard error, on ours."""
        self.log.seek(0)
        if said := self.log.read()[-MOST_SHOWN:].strip():
            tell(f"{self.name} wrote:\n{said}")

    def death(self) -> WorkerFailed:
        code = self.process.wait()
        self.show_log()
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
            self.log.close()


@lru_cache(maxsize=1)
def our_packages() -> Path:
    """A folder with links to this project's packages alone: beside them, where pip installed them, lie all others of
    this Python, which another interpreter must not import."""
    folder = Path(tempfile.mkdtemp(prefix="dmpt-export-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in OURS:
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    return folder


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
