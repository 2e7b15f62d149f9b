"""Where results go: which folders may be replaced, and what must not lie in them. Checked before any work is done."""

from __future__ import annotations

import fnmatch
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.checkpoints.files import check_name, read_json
from training.checkpoints.lock import LOCK, check_free
from training.errors import FieldError, InputError

# What a folder of ours may hold. Anything else in a folder to be replaced is the user's work.
OWN_FILES = [
    "*.json", "*.jsonl", "*.safetensors", "*.onnx", "*.onnx.data", "*.md", "*.png", "*.svg", "*.csv", "*.html",
    "merges.txt", "*.mjs", "*.css",
]  # fmt: skip
OWN_FOLDERS = {  # and what they may hold
    "trainer_state": ["*"],
    "onnx": ["*.onnx", "*.onnx_data"],
    "vendor": ["*.mjs", "*.wasm", "*.LICENSE"],
    "model": OWN_FILES,
}
RUNS = ("last", "phase-1")  # exist in a run that can be continued: with one phase, with several
LEFTOVER = re.compile(r"\.(.+)\.(?:tmp(-[0-9a-f]{8})?|new-[0-9a-f]{8})", re.DOTALL)  # see beside()
NAME_MAX = 255  # bytes of a name, on every common file system


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json")
    except InputError:
        return {}


def _is_dmpt(folder: Path, *, quantized: bool) -> bool:
    config = _config(folder)
    return config.get("model_type") == "dmpt" and (config.get("quantization") is not None) == quantized


# kind of product -> test for a folder of that kind
KINDS: dict[str, Callable[[Path], bool]] = {
    "checkpoint": lambda folder: _is_dmpt(folder, quantized=False),
    "quantized": lambda folder: _is_dmpt(folder, quantized=True),
    "onnx": lambda folder: (folder / "dmpt_manifest.json").is_file(),
    "page": lambda folder: (folder / "page.mjs").is_file() and (folder / "model").is_dir(),
    "comparison": lambda folder: (folder / "comparison.json").is_file(),
}


def check_new(out: Path, kind: str, overwrite: bool) -> None:
    """check_replaceable() for commands: an earlier result is replaced only with `overwrite`, and nothing while another
    run works on it. Raises InputError before any work is done."""
    check_replaceable(out, kind)
    check_free(out, beside=True)
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise FieldError("{} holds an earlier result: give another folder, or replace it with {overwrite}", out)


def check_replaceable(out: Path, kind: str) -> None:
    """Raise InputError unless `out` is absent, an empty folder, or holds only a product of the same kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of folder '{kind}': add it to KINDS")
    check_place(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file: give a folder that does not exist yet")
    names = sorted(os.listdir(out))
    if not names:
        return
    if not KINDS[kind](out):
        raise InputError(f"{out} is not empty and is not a dmpt-export {kind} folder: give another one")
    foreign = [name for name in names if not _own(out / name)]
    if foreign:
        raise InputError(
            f"{out} also holds {', '.join(foreign)}, which replacing it would delete: "
            "move those files away or give another folder"
        )


def check_run(out: Path, overwrite: bool) -> None:
    """Raise InputError when a new training run cannot use `out`: it holds something else, or a run to keep."""
    check_place(out)
    if not out.is_dir():
        if out.exists():
            raise InputError(f"{out} is a file: give a folder that does not exist yet")
        return
    names = {path.name for path in out.iterdir() if path.name != LOCK and not is_leftover(path.name)}
    if names and not names & {*RUNS, "metrics.jsonl"}:
        raise InputError(f"{out} is not empty and holds no training run: give another folder")
    if names & {*RUNS} and not overwrite:
        raise FieldError("{} holds a training run: continue it with {resume}, or replace it with {overwrite}", out)


def check_inputs(out: Path, *inputs: str | os.PathLike[str] | None) -> None:
    """Raise InputError for an input that replacing `out` would delete: it is `out`, lies in it, or links into it.

    inputs: folders and files that a verb reads; hub ids and None are ignored. Hard links are safe: their data stays
    when `out` is deleted.
    """
    if not os.path.lexists(out):
        return
    for given in inputs:
        if given is None or not os.path.exists(given):
            continue
        path = Path(given)
        inside = list(path.iterdir()) if path.is_dir() else []
        for real in {path.resolve(), *(entry.resolve() for entry in inside if entry.is_symlink())}:
            if any(above.exists() and above.samefile(out) for above in (real, *real.parents)):
                raise InputError(
                    f"{given} lies in {out}, which would be replaced: give another place, or copy it first"
                )
            if out.is_file() and path.is_dir() and path.resolve() in out.resolve().parents:
                raise InputError(f"{out} is a file of {given}, which is read: give another place")


def check_new_file(out: Path, overwrite: bool, *inputs: str | os.PathLike[str] | None) -> None:
    """Raise InputError for a file that cannot be written, exists without `overwrite`, or is one of the inputs."""
    check_place(out)
    if out.exists() and not overwrite:
        raise FieldError("{} exists: give another file, or replace it with {overwrite}", out)
    check_inputs(out, *inputs)


def check_place(out: Path) -> None:
    """Raise InputError when `out` cannot be created or written: a bad name, a bad parent, or missing permissions."""
    check_name(out)
    try:
        out = out.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out} cannot be used ({error}): give another place") from error
    longest = len(os.fsencode(beside(out, "tmp").name))
    if longest > NAME_MAX:
        room = NAME_MAX - longest + len(os.fsencode(out.name))
        raise InputError(f"the name '{out.name}' is too long: give one of at most {room} bytes")
    if out.is_dir():
        if not os.access(out, os.W_OK | os.X_OK):
            raise InputError(f"{out} is not writable: give another place")
        return
    above = next((path for path in out.parents if path.exists()), Path("/"))
    if not above.is_dir():
        raise InputError(f"{out} cannot be created, because {above} is a file: give another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be created, because {above} is not writable: give another place")


def _own(path: Path) -> bool:
    if not path.is_dir():
        return _matches(path.name, OWN_FILES) or is_leftover(path.name)
    return path.name in OWN_FOLDERS and all(_matches(name, OWN_FOLDERS[path.name]) for name in os.listdir(path))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def is_leftover(name: str) -> bool:
    """Whether a file or folder is one that this program was writing (earlier versions published `.config.json.tmp`)."""
    found = LEFTOVER.fullmatch(name)
    return found is not None and (not name.endswith(".tmp") or _matches(found[1], OWN_FILES))


def beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}-{secrets.token_hex(4)}")
