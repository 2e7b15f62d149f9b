"""What an evaluation has found so far, token by token, so that a killed one goes on where it stopped.

Everything is kept per scored token and the figures are made of it at the end, so a run that was cut gives the same
digits as one that was not. The file belongs to one model, text and protocol: its name is a hash of them.
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

EVERY_S = 10.0  # between two writes: all that a kill costs


def key_of(**facts: Any) -> str:
    """32 hex digits for whatever decides the numbers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def read_arrays(file: Path, names: Iterable[str], hint: str) -> list[NDArray[Any]]:
    """Arrays of an .npz file; InputError, ending with what to do, when it is damaged or lacks one."""
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as stored:  # load leaks what it opens
            return [stored[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is damaged ({first_line(error)}): {hint}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fingerprint(scorer: Scorer) -> str:
    """sha256 of all that decides what a scorer says: weights, configuration, path mode, fast-k, device and peer."""
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
    manifest = folder / MANIFEST_NAME  # lists the hashes of an export's files, which were checked when it was opened
    files = [manifest] if manifest.is_file() else [folder / "config.json", *weight_files(folder)]
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class Findings:
    """Arrays over the scored tokens, in the text's order, filled window by window."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], file: Path | None, sizes: Sequence[int]) -> None:
        """arrays: name -> [total, ...]. file: where they are kept; a run's earlier state there is taken up.
        sizes: tokens that each window scores.

        Raises InputError for a file that is damaged or not of this evaluation, OSError when it cannot be written.
        """
        self.arrays, self.file, self.sizes = dict(arrays), file, sizes
        self.done = 0  # tokens
        self.windows = self.complete = 0  # windows that are complete, and their tokens
        self.saved = time.monotonic()
        if file is not None and file.is_file():
            self._load(file)
        elif file is not None:
            self.save()  # a place that cannot be written to is refused before the long work

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def add(self, **values: NDArray[Any]) -> None:
        """The next tokens' values; all that are kept."""
        n = len(next(iter(values.values())))
        for name, found in values.items():
            self.arrays[name][self.done : self.done + n] = found
        self.done += n

    def end_of_windows(self, count: int) -> None:
        """Note that `count` more windows are complete, and write now and then."""
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
        hint = "delete it, and the evaluation starts again"
        owner, counts, *stored = read_arrays(file, ["name", "counts", *self.arrays], hint)
        if str(owner) != file.name:
            raise InputError(f"{file} was {owner} once, and is of another evaluation: {hint}")
        if counts.dtype != np.int64 or counts.shape != (2,) or counts.min() < 0:
            raise InputError(f"{file} is damaged: {hint}")
        (windows, done), found = counts.tolist(), dict(zip(self.arrays, stored, strict=True))
        if sum(self.sizes[:windows]) != done:
            raise InputError(f"{file} is damaged, {windows} windows have not {done} tokens: {hint}")
        for name, array in self.arrays.items():
            if found[name].dtype != array.dtype or found[name].shape != (done, *array.shape[1:]) or done > len(array):
                raise InputError(f"{file} is not of this evaluation: {hint}")
            array[:done] = found[name]
        if not np.isfinite(self.arrays["nll"][:done]).all():
            raise InputError(f"{file} is damaged, it holds losses that are no numbers: {hint}")
        self.windows, self.complete, self.done = windows, done, done

    def finish(self) -> None:
        """Remove the state: the evaluation is complete."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
