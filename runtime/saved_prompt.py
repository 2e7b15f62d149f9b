"""A prompt that was read, as a file: its ids, every node's keys and values, and the rows that nodes still lag behind.

    MAGIC                       16 bytes
    size of the header          uint64
    header, JSON                format_version, model, tokens, and `done`: the tokens in each node's caches
    ids                         int64 [tokens]
    rows of each split node     [lag, n_embd]: for tokens that a child of it has not processed
    keys and values             int8 or float [n_head, done, head_dim], block by block in the tree's order
    sha256 of all the above     32 bytes

Numbers are little-endian. All sizes follow from the header and the model's manifest, so a file of another size is
refused before any of its content is read: it can make the reader hold no more than a full context's caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.manifest import ROOT, Manifest
from runtime.manifest_file import REPORT_NAME
from runtime.replace import LONGEST_NAME, replacing
from runtime.schema import COUNT, ID, NAME, SHA256, Each, faults, shown

MAGIC = b"dmpt-prompt-file"
FORMAT_VERSION = 1
START = struct.Struct("<16sQ")  # MAGIC, size of the header
MOST_HEADER = 1 << 20  # bytes; a real one has less than a thousand
DIGEST = 32  # bytes of a sha256
NOT_RUN = {"README.md", REPORT_NAME}  # files of an export that do not change what it computes
MODEL = {"name": NAME, "scheme": NAME, "caches": NAME, "activations": NAME, "source": NAME, "files": SHA256}
FORM = {"format_version": COUNT, "model": MODEL, "tokens": COUNT, "done": Each(ID)}


@dataclass(frozen=True)
class State:
    """What a sequence keeps of its tokens."""

    ids: NDArray[np.int64]  # [tokens]
    done: dict[str, int]  # node -> tokens in its caches
    rows: dict[str, NDArray[Any]]  # split node -> its output rows that a child has not processed, [lag, n_embd]
    caches: dict[str, NDArray[Any]]  # cache name -> keys or values, [n_head, done, head_dim]


def lags(manifest: Manifest, done: dict[str, int]) -> dict[str, int]:
    """Of each split node, the latest tokens that a child of it has not processed."""
    return {node.name: done[node.name] - min(done[c] for c in node.children) for node in manifest.tree if node.children}


# --- write ------------------------------------------------------------------------------------------


def write_state(path: str | PathLike[str], state: State, manifest: Manifest) -> None:
    """Write a state in one step, over an earlier one. Equal states make equal files.

    Raises RequestError where something other than a saved prompt would be replaced, OSError for a full disk.
    """
    check_place(path)
    facts = {"format_version": FORMAT_VERSION, "model": identity(manifest), "tokens": len(state.ids)}
    header = json.dumps({**facts, "done": state.done}, sort_keys=True).encode()
    start = START.pack(MAGIC, len(header)) + header
    digest = hashlib.sha256(start)
    with replacing(Path(path)) as file:
        file.write(start)
        for part in map(raw_bytes, arrays_of(state, manifest)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


def arrays_of(state: State, manifest: Manifest) -> list[NDArray[Any]]:
    """All arrays of a state, in the order of layout()."""
    caches = [state.caches[name] for node in manifest.tree for name in node.caches]
    return [state.ids, *(state.rows[split] for split in lags(manifest, state.done)), *caches]


def raw_bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array, little(array.dtype)).reshape(-1).view(np.uint8).data


def little(dtype: Any) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def check_place(path: str | PathLike[str]) -> None:
    """Raise RequestError where a saved prompt cannot be written: no folder, no permission, or another file."""
    try:
        target = Path(path).resolve()  # a link is written through
        there = target.exists()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a null character
        why = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{path} cannot be used ({why}): give another place") from error
    if not target.parent.is_dir():
        raise RequestError(f"{target.parent} is not a folder: a prompt can be saved in existing folders only")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise RequestError(f"{target.parent} is not writable: give another place")
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise RequestError(f"the name '{target.name}' is too long: give one of at most {LONGEST_NAME} bytes")
    if there:
        with opened(Path(path), "it would be replaced, give another place"):
            pass


def identity(manifest: Manifest) -> dict[str, str]:
    """What the caches depend on: the model, how it is stored, and the files of this export of it."""
    source = manifest.raw["source"] or {}
    files = sorted(f"{entry.name} {entry.sha256}" for entry in manifest.files if entry.name not in NOT_RUN)
    return {
        "name": str(source.get("name") or "a model without a name"),
        "scheme": manifest.raw["quantization"]["scheme"],
        "caches": manifest.cache_dtype,
        "activations": manifest.activation_dtype,
        "source": str(source.get("fingerprint") or "unknown"),
        "files": hashlib.sha256("\n".join(files).encode()).hexdigest(),
    }


# --- read -------------------------------------------------------------------------------------------


def read_state(path: str | PathLike[str], manifest: Manifest) -> State:
    """The state that write_state() wrote for this export. Raises RequestError for a file that is missing, damaged, of
    another model or export of it, or of a later format."""
    with opened(Path(path)) as file:
        try:
            start, header = read_header(file)
            check_version(header, path)
            check_form(header)
            check_model(header["model"], identity(manifest), path)
            done = checked_done(header, manifest)
            return read_body(file, start, done, manifest)
        except Damage as damage:
            raise RequestError(f"{path} is damaged ({damage}): save the prompt again") from damage
        except OSError as error:
            raise RequestError(f"{path} cannot be read ({error.strerror}): save the prompt again") from error


def check_saved(path: str | PathLike[str]) -> None:
    """Raise RequestError unless a file begins like a saved prompt."""
    with opened(Path(path)):
        pass


class Damage(Exception):
    """What is wrong with a file; becomes a RequestError that names it."""


@contextlib.contextmanager
def opened(path: Path, advice: str = "give a file that a prompt was saved to") -> Iterator[BinaryIO]:
    """A file that begins with MAGIC, at its beginning. Raises RequestError for anything else."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        file = open(path, "rb") if regular else None  # noqa: SIM115 (closed below); opening a pipe would wait
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{path} cannot be read ({why}): {advice}") from error
    if file is None:
        raise RequestError(f"{path} is not a regular file: {advice}")
    with file:
        if file.read(len(MAGIC)) != MAGIC:
            raise RequestError(f"{path} is not a saved prompt: {advice}")
        file.seek(0)
        yield file


def read_header(file: BinaryIO) -> tuple[bytes, Any]:
    """The bytes before the arrays, and the JSON value in them."""
    start = file.read(START.size)
    if len(start) < START.size:
        raise Damage("it ends early")
    size = START.unpack(start)[1]
    if size > MOST_HEADER:
        raise Damage(f"a header of {size} bytes")
    header = file.read(size)
    try:
        return start + header, json.loads(header)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise Damage("its header is not JSON") from error


def check_version(header: Any, path: str | PathLike[str]) -> None:
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise RequestError(
            f"{path} has format {shown(version)}, this program reads format {FORMAT_VERSION}: update the program, or "
            "save the prompt again with this one"
        )


def check_form(header: Any) -> None:
    if problems := faults(header, FORM):
        raise Damage(f"header: {problems[0]}")


def check_model(saved: dict[str, str], here: dict[str, str], path: str | PathLike[str]) -> None:
    if all(saved[key] == here[key] for key in MODEL if key != "name"):
        return
    was, now = described(saved), described(here)
    how = "export of" if saved["source"] == here["source"] else "model of the same name as"
    made = f"{was}, and this model is {now}" if was != now else f"a different {how} {now}"
    raise RequestError(f"{path} was saved with {made}: save the prompt again with this model")


def described(model: dict[str, str]) -> str:
    """A model in words; shown() hides control characters of a hostile file."""
    name, scheme, caches, activations = (shown(model[key]) for key in ("name", "scheme", "caches", "activations"))
    return f"{name} (weights {scheme}, caches {caches}, activations {activations})"


def checked_done(header: dict[str, Any], manifest: Manifest) -> dict[str, int]:
    """Tokens in each node's caches: all of them in the root's, nowhere more than in the parent's."""
    done, tokens = header["done"], header["tokens"]
    if done.keys() != manifest.nodes.keys():
        raise Damage("its nodes are not those of the model")
    if tokens > manifest.config.n_positions or done[ROOT] != tokens:
        raise Damage(
            f"{tokens} tokens, {done[ROOT]} of them in the caches, in a context of {manifest.config.n_positions}"
        )
    if ahead := [node.name for node in manifest.tree if node.parent and done[node.name] > done[node.parent]]:
        raise Damage(f"{ahead[0]} is ahead of its parent")
    return {name: done[name] for name in manifest.nodes}


def layout(manifest: Manifest, done: dict[str, int]) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of each array of a file: ids, rows, caches."""
    config = manifest.config
    rows, cache = little(manifest.activation_dtype), little(manifest.cache_dtype)
    return [
        (little(np.int64), (done[ROOT],)),
        *((rows, (lag, config.n_embd)) for lag in lags(manifest, done).values()),
        *((cache, (config.n_head, done[node.name], config.head_dim)) for node in manifest.tree for _ in node.caches),
    ]


def read_body(file: BinaryIO, start: bytes, done: dict[str, int], manifest: Manifest) -> State:
    """The arrays after the header, and the check of their sha256. start: all bytes before them."""
    parts = layout(manifest, done)
    expected = len(start) + sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in parts) + DIGEST
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise Damage(f"it has {size} bytes, expected {expected}")
    digest = hashlib.sha256(start)
    arrays = [read_array(file, dtype, shape, digest) for dtype, shape in parts]
    if file.read() != digest.digest():
        raise Damage("its sha256 differs")
    check_numbers(arrays, manifest)
    splits, names = lags(manifest, done), [name for node in manifest.tree for name in node.caches]
    rows = dict(zip(splits, arrays[1 : 1 + len(splits)], strict=True))
    return State(arrays[0], done, rows, dict(zip(names, arrays[1 + len(splits) :], strict=True)))


def read_array(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...], digest: Any) -> NDArray[Any]:
    array = np.empty(shape, dtype)
    room = array.reshape(-1).view(np.uint8).data
    if file.readinto(room) != len(room):  # type: ignore[attr-defined]
        raise Damage("it ends early")
    digest.update(room)
    return array.astype(dtype.newbyteorder("="), copy=False)


def check_numbers(arrays: list[NDArray[Any]], manifest: Manifest) -> None:
    """A sha256 can be right and the numbers wrong: ids beyond the vocabulary would be read as zeros."""
    if arrays[0].min() < 0 or arrays[0].max() >= manifest.config.vocab_size:
        raise Damage(f"an id outside the vocabulary, 0 to {manifest.config.vocab_size - 1}")
    if not all(np.isfinite(array).all() for array in arrays[1:]):
        raise Damage("a number that is not finite")
