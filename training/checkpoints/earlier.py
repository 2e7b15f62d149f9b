"""Keep an earlier result until the new one, which replaces it piece by piece, is complete.

    set_aside(out, names, complete)      moves entries with these names from `out` into out/.earlier
    ...                                  the new result is written
    settle(out)                          new result complete: delete the old one; else restore it

A kill in between leaves .earlier, and recover_earlier() makes the same decision. Standard library only.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from training.checkpoints.atomic import locked
from training.errors import InputError

ASIDE, MOVING = ".earlier", ".earlier-moving"  # complete, and while entries are moved in or out
# Entries of a training run's folder, except the published model, whose files are replaced one by one.
RUN = ("last", "best", "tensorboard", "metrics.jsonl", "phase-*")
SAVED = ("last", "phase-1/last")  # one of them exists once a run can be continued
_ours: dict[Path, ExitStack] = {}  # path of each .earlier that this process made -> its lock


def _present(out: Path, names: Sequence[str]) -> list[str]:
    """Entries of `out` that match `names`, which may be patterns such as phase-*."""
    there = os.listdir(out) if out.is_dir() else []
    return sorted(name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in names))


def set_aside(out: Path, names: Sequence[str]) -> None:
    """Move entries of `out` that match `names` into out/.earlier. Raises InputError when another process did so."""
    if not (present := _present(out, names)):
        return
    aside, moving = out / ASIDE, out / MOVING
    if aside.exists() or moving.exists():
        raise InputError(f"another run is writing to {out}, as {aside} exists: wait for it or give another OUT")
    moving.mkdir()
    with ExitStack() as stack:
        stack.enter_context(locked(moving))
        for name in present:
            os.rename(out / name, moving / name)
        os.rename(moving, aside)
        _ours[aside.resolve()] = stack.pop_all()


def settle(out: Path, names: Sequence[str], complete: Sequence[str]) -> None:
    """Finish what set_aside() began in this process, if anything. The new result is complete once it has one of
    the entries `complete`."""
    aside = (out / ASIDE).resolve()
    if (lock := _ours.pop(aside, None)) is not None:
        with lock:
            _decide(out, names, complete)


def recover_earlier(out: Path, names: Sequence[str], complete: Sequence[str]) -> None:
    """settle() after a kill. Does nothing while the process that set the earlier result aside still runs."""
    for folder in (out / MOVING, out / ASIDE):
        if os.path.isdir(folder):
            # an OSError: another process holds the lock, or we may not change the folder
            with contextlib.suppress(OSError), locked(folder, insist=True):
                _decide(out, names, complete)


def _decide(out: Path, names: Sequence[str], complete: Sequence[str]) -> None:
    moving, aside = out / MOVING, out / ASIDE
    if moving.is_dir():  # there is no new result yet, or no longer
        _put_back(moving, out)
    elif aside.is_dir() and any(os.path.lexists(out / name) for name in complete):
        shutil.rmtree(aside)
    elif aside.is_dir():
        for name in _present(out, names):
            _remove(out / name)
        os.rename(aside, moving)  # from here on the old result is restored
        _put_back(moving, out)


def _put_back(aside: Path, out: Path) -> None:
    for path in list(aside.iterdir()):
        os.rename(path, out / path.name)
    aside.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(out: Path, names: Sequence[str], complete: Sequence[str]) -> Iterator[None]:
    """set_aside(), then settle() at the end of the block, even after an error."""
    recover_earlier(out, names, complete)
    set_aside(out, names)
    try:
        yield
    finally:
        settle(out, names, complete)
