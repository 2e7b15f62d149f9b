"""Shared parts of the evidence drivers: run the command line, store result lines, read the peers' interpreters."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any


def dmpt_export(*arguments: object, threads: int | None = None, **pipes: Any) -> subprocess.CompletedProcess[str]:
    """Run a verb of the command line with the given number of threads; pipes: options of subprocess.run."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, "-m", "dmpt_export", *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, **pipes)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class Results:
    """results.jsonl: one line per measurement, appended and flushed at once. Several processes may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def has(self, **key: Any) -> bool:
        """Whether a line holds all these values."""
        return any(key.items() <= line.items() for line in self.lines)

    def add(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(json.dumps(line, allow_nan=False) + "\n")


def add_peer_python(parser: argparse.ArgumentParser, known: Collection[str]) -> None:
    """--peer-python NAME=PYTHON, several times; options.peer_python has the pairs."""

    def pair(text: str) -> tuple[str, str]:
        name, equals, python = text.partition("=")
        if not equals or name not in known:
            raise argparse.ArgumentTypeError(f"{text}: give NAME=PYTHON with one of {', '.join(known)}")
        return name, python

    parser.add_argument("--peer-python", action="append", default=[], type=pair, metavar="NAME=PYTHON",
                        help=f"the Python that has a peer ({', '.join(known)}); default: this one")  # fmt: skip
