"""A demo's folder: whose it is, whether the run in it goes on or starts anew, and what is written to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.checkpoints.atomic import atomic_file, scratch_folder
from training.checkpoints.lock import LOCK, check_free
from training.errors import FieldError

MARKER = "demo.json"  # marks a folder as a demo's
FOLDERS = ("corpus", "tokenizer", "checkpoints", "quantized", "onnx")
RESULTS = ("comparison.json", "comparison.md", "comparison.csv", "comparison.svg", "report.html")


def check_out(out: Path) -> None:
    """Raise InputError unless `out` is absent, empty, or an earlier demo's folder."""
    from training.checkpoints.places import check_place, is_leftover

    check_place(out)
    check_free(out)
    if out.exists() and not out.is_dir():
        raise FieldError("{} is a file: give a folder with {out}", out)
    found = [] if not out.is_dir() else [name for name in os.listdir(out) if name != LOCK and not is_leftover(name)]
    if found and MARKER not in found:
        raise FieldError("{} is not empty and was not made by `dmpt-export demo`: give another folder with {out}", out)


def begin(out: Path, run: dict[str, Any]) -> bool:
    """Whether `out` holds a stopped demo described by the same `run`, which then goes on; else `out` is cleared."""
    if _read(out) == {**run, "finished": False}:
        return True
    out.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    _mark(out, run, finished=False)
    return False


def finish(out: Path) -> None:
    """The same command starts anew from now on."""
    _mark(out, _read(out), finished=True)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")


def publish(write: Callable[[Path], None], out: Path) -> None:
    """Call `write` with a temporary folder inside `out`, then move its files up, each in one step."""
    with scratch_folder(out / "comparison") as folder:
        write(folder)
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)


def _read(out: Path) -> Any:
    try:
        return json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _mark(out: Path, run: dict[str, Any], *, finished: bool) -> None:
    with atomic_file(out / MARKER) as file:
        write(file, json.dumps({**run, "finished": finished}, indent=1) + "\n")
