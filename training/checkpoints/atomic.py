"""Write results so that a kill at any moment leaves either the old state or the new one.

    with atomic_folder(out, "checkpoint") as tmp:
        (tmp / "config.json").write_text(...)

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import glob
import importlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.checkpoints.files import check_name, read_json
from training.errors import FieldError, InputError

# Without POSIX file locks, leftovers of a killed run stay until they are removed by hand.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

# What a folder of ours may hold. Anything else in a folder to be replaced is the user's work.
OWN_FILES = [
    "*.json",
    "*.jsonl",
    "*.safetensors",
    "*.onnx",
    "*.onnx.data",
    "*.md",
    "*.png",
    "*.svg",
    "*.csv",
    "*.html",
    "merges.txt",
]
OWN_FOLDERS = ["trainer_state"]
RUNS = ("last", "phase-1")  # exist in a run that can be continued: with one phase, with several
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
    "comparison": lambda folder: (folder / "comparison.json").is_file(),
}


def check_replaceable(out: Path, kind: str) -> None:
    """Raise InputError unless `out` is absent, an empty folder, or holds only a product of the same kind.

    Commands call it before long work, so that a wrong OUT is refused in the first second.
    """
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
    names = {path.name for path in out.iterdir()}
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


def check_place(out: Path) -> None:
    """Raise InputError when `out` cannot be created or written: a bad name, a bad parent, or missing permissions."""
    check_name(out)
    try:
        out = out.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out} cannot be used ({error}): give another place") from error
    longest = len(os.fsencode(_beside(out, "tmp").name))
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
    patterns = OWN_FOLDERS if path.is_dir() else OWN_FILES
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


@contextlib.contextmanager
def atomic_folder(out: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it becomes `out` in one step, on any error it is deleted.

    An older product of the same `kind` (a key of KINDS) is replaced; anything else at `out` is refused
    (InputError, see check_replaceable). After a kill, `out` is absent, old or complete; the next run removes the
    killed run's leftovers beside it (`.{name}.tmp-*`).
    """
    target = Path(out).resolve()
    recover(target)
    check_replaceable(target, kind)
    with _made_parents(target.parent):
        tmp = _beside(target, "tmp")
        tmp.mkdir()
        with locked(tmp):
            try:
                yield tmp
                settle(tmp)
                _swap(tmp, target)
            except BaseException:  # also Ctrl-C: leave nothing half-written
                shutil.rmtree(tmp, ignore_errors=True)
                raise


@contextlib.contextmanager
def atomic_file(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside `out`; on success it replaces `out`, on any error it is deleted."""
    target = Path(out).resolve()
    _remove_leftovers(target)
    with _made_parents(target.parent):
        tmp = _beside(target, "tmp")
        tmp.touch()
        with locked(tmp):
            try:
                yield tmp
                _sync(tmp)
                os.replace(tmp, target)
                _sync(target.parent)
            except BaseException:
                tmp.unlink(missing_ok=True)
                raise


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}-{secrets.token_hex(4)}")


def _swap(tmp: Path, target: Path) -> None:
    """Replace `target` by `tmp` and delete the old content."""
    old = tmp
    if not target.exists() or not os.listdir(target):
        os.replace(tmp, target)
    elif not _exchange(tmp, target):
        old = _beside(target, "old")
        _step_aside(tmp, target, old)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system (Linux can) or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _step_aside(tmp: Path, target: Path, old: Path) -> None:
    """Two renames instead of an exchange; a kill between them leaves `old`, which the next run puts back."""
    try:
        os.rename(target, old)
        os.replace(tmp, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def recover(out: str | os.PathLike[str]) -> None:
    """Clean up after a killed run: restore the old folder if nothing replaced it, remove the rest."""
    target = Path(out).resolve()
    if not _remove_leftovers(target):
        return  # another run is writing this target right now
    for old in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def _remove_leftovers(target: Path) -> bool:
    """Delete what killed runs were writing for `target`. False when another run is still writing there."""
    leftovers = list(target.parent.glob(f".{glob.escape(target.name)}.tmp-*"))
    for path in leftovers:
        # an OSError means that a running writer holds the lock, or that we may not delete it
        with contextlib.suppress(OSError), locked(path, insist=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return not any(path.exists() for path in leftovers)


@contextlib.contextmanager
def locked(path: Path, insist: bool = False) -> Iterator[None]:
    """Hold an advisory lock on a file or folder, so that another run knows it is in use.

    The system releases it when the process ends for any reason. `insist`: raise OSError when the lock is unavailable.
    """
    if fcntl is None:
        if insist:
            raise OSError("no file locks on this system")
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # some network file systems cannot lock folders
            if insist:
                raise
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _made_parents(folder: Path) -> Iterator[None]:
    """Create `folder` and its parents; remove those created when the body fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def settle(folder: Path) -> None:
    """Give every file the usual permissions (some libraries write private files) and flush all to disk, so that a
    rename never publishes empty files."""
    mode = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(parent) / name, mode)
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened, nor files synced through a read-only handle
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
