"""The state of an evaluation, token by token, so that a killed evaluation can continue.

All values are stored per scored token and the figures are computed from them at the end, so an interrupted run gives
the same digits as an uninterrupted one. A file belongs to one model, text and protocol: its name is their hash.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.scorer import Scorer, weight_files
from runtime.manifest_file import MANIFEST_NAME
from training.checkpoints.atomic import atomic_file
from training.errors import InputError

EVERY_S = 10.0  # seconds between two writes, the most that a kill loses


def key_of(**facts: Any) -> str:
    """32 hex digits for everything that determines the numbers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def read_arrays(file: Path, names: Iterable[str], hint: str) -> list[NDArray[Any]]:
    """Arrays of an .npz file. Raises InputError, ending with `hint`, when it is damaged or lacks one."""
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as stored:  # load leaks the files it opens
            return [stored[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is damaged ({first_line(error)}): {hint}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fingerprint(scorer: Scorer) -> str:
    """sha256 of all that determines a scorer's output: weights, configuration, path mode, fast-k, device and peer."""
    facts = (
        scorer.mode,
        getattr(scorer, "fast_k", None),
        getattr(scorer, "device", "cpu"),
        *getattr(scorer, "peer", ()),
    )
    return hashlib.sha256(f"{files_digest(scorer.folder)} {json.dumps(facts)}".encode()).hexdigest()


def files_digest(folder: str | Path) -> str:
    """sha256 of a model folder's weights and configuration."""
    folder, digest = Path(folder), hashlib.sha256()
    manifest = folder / MANIFEST_NAME  # lists the hashes of an export's files, which were checked on opening
    files = [manifest] if manifest.is_file() else [folder / "config.json", *weight_files(folder)]
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class Findings:
    """Arrays over the scored tokens, in the text's order, filled window by window."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], file: Path | None, sizes: Sequence[int]) -> None:
        """arrays: name -> [total, ...]. file: where they are stored; an earlier state there is continued.
        sizes: tokens that each window scores.

        Raises InputError for a file that is damaged or from another evaluation, OSError when it cannot be written.
        """
        self.arrays, self.file, self.sizes = dict(arrays), file, sizes
        self.done = 0  # tokens
        self.windows = self.complete = 0  # complete windows, and their tokens
        self.saved = time.monotonic()
        if file is not None and file.is_file():
            self._load(file)
        elif file is not None:
            self.save()  # fail on an unwritable place before long work

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def add(self, **values: NDArray[Any]) -> None:
        """Store the next tokens' values."""
        n = len(next(iter(values.values())))
        for name, found in values.items():
            self.arrays[name][self.done : self.done + n] = found
        self.done += n

    def end_of_windows(self, count: int) -> None:
        """Count `count` more windows as complete, and write from time to time."""
        self.windows, self.complete = self.windows + count, self.done
        if self.file is not None and time.monotonic() - self.saved > EVERY_S:
            self.save()

    def save(self) -> None:
        if self.file is None:
            return
        with atomic_file(self.file) as tmp, open(tmp, "wb") as out:
            parts: dict[str, Any] = {name: array[: self.complete] for name, array in self.arrays.items()}
            counts = np.array([self.windows, self.complete], np.int64)
            np.savez(out, name=np.array(self.file.name), counts=counts, **parts)
        self.saved = time.monotonic()

    def _load(self, file: Path) -> None:
        hint = "delete it to start the evaluation again"
        owner, counts, *stored = read_arrays(file, ["name", "counts", *self.arrays], hint)
        if str(owner) != file.name:
            raise InputError(f"{file} was {owner} once and belongs to another evaluation: {hint}")
        if counts.dtype != np.int64 or counts.shape != (2,) or counts.min() < 0:
            raise InputError(f"{file} is damaged: {hint}")
        (windows, done), found = counts.tolist(), dict(zip(self.arrays, stored, strict=True))
        if sum(self.sizes[:windows]) != done:
            raise InputError(f"{file} is damaged, {windows} windows do not have {done} tokens: {hint}")
        for name, array in self.arrays.items():
            if found[name].dtype != array.dtype or found[name].shape != (done, *array.shape[1:]) or done > len(array):
                raise InputError(f"{file} belongs to another evaluation: {hint}")
            array[:done] = found[name]
        if not np.isfinite(self.arrays["nll"][:done]).all():
            raise InputError(f"{file} is damaged, it holds losses that are not finite: {hint}")
        self.windows, self.complete, self.done = windows, done, done

    def finish(self) -> None:
        """Remove the state: the evaluation is complete."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
