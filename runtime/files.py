"""Check that a folder holds the files that its manifest lists, bit by bit, and that its graph opens no others."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Set
from pathlib import Path

from runtime.errors import ModelError
from runtime.graph_data import data_files
from runtime.manifest import FileSpec, Manifest
from runtime.manifest_file import CARD_NAME, MANIFEST_NAME, SIDE_FILES
from runtime.schema import shown

LINK = "is a symbolic or hard link (`cp -RL` makes a folder without links)"


def check_files(folder: Path, manifest: Manifest, verify: bool = True) -> None:
    """Compare the folder with the manifest's list: kind of file, size and, with `verify`, sha256.

    Links let a folder from elsewhere point at files outside it, so symbolic links are refused. A hard link cannot be
    distinguished from the file itself (`cp -al` makes them). If the manifest lists it, its sha256 must match, so it can
    only hold what the manifest's author knew. Without `verify`, or if it is not listed, it is refused. README.md, which
    people edit, is treated as if it were not listed where it differs. What the graph opens is checked by check_data.
    Raises ModelError naming every file that differs, and how.
    """
    compared = [entry for entry in manifest.files if entry.name == manifest.model or not is_card(folder / entry.name)]
    problems = [f"{entry.name} {fault}" for entry in compared if (fault := file_fault(folder, entry, verify))]
    listed = {MANIFEST_NAME, *(entry.name for entry in manifest.files)}
    problems += [f"{entry.name} {LINK}" for entry in os.scandir(folder) if entry.name not in listed and is_link(entry)]
    if problems:
        raise ModelError(f"{folder} differs from what was exported, copy or export it again: {'; '.join(problems)}")


def check_data(folder: Path, graphs: Collection[str], listed: Iterable[str], others: Set[str] = SIDE_FILES) -> None:
    """Raise ModelError unless the graphs of a folder name exactly the data files that its manifest lists.

    A graph names its data files itself, and one from elsewhere may name any file of this machine: in a subfolder, by
    `..`, or behind a hard link. The listed ones were compared with their hashes. others: files that no graph names.
    """
    listed, named = {*listed} - others - {*graphs}, set()
    for graph in graphs:
        if not graph.endswith(".onnx"):  # ONNX Runtime reads a file that ends in .ort as another format
            raise ModelError(f"cannot load {folder / graph}: it is not an .onnx file: export the model again")
        above = graph.rpartition("/")[0]
        named |= {f"{above}/{name}" if above else name for name in data_files(folder / graph)}
    if foreign := sorted(named - listed):
        raise ModelError(
            f"cannot load {folder}: its graph takes data from {', '.join(map(shown, foreign))}, which its manifest "
            "does not list: do not use this model"
        )
    if unused := sorted(listed - named):
        raise ModelError(
            f"cannot load {folder}: its manifest lists {', '.join(map(shown, unused))}, which its graph does not name: "
            "export the model again"
        )


def file_fault(folder: Path, entry: FileSpec, verify: bool) -> str | None:
    path = folder / entry.name
    try:
        found = path.lstat()
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return LINK if stat.S_ISLNK(found.st_mode) else "is not a regular file"
    if found.st_nlink > 1 and not verify:
        return f"{LINK}, and its content is not compared"
    if found.st_size != entry.size:
        return f"has {found.st_size} bytes, expected {entry.size}"
    try:
        return "has a different sha256 than its manifest" if verify and sha256(path) != entry.sha256 else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def is_card(path: Path) -> bool:
    """Whether this is the card, missing or a file of its own: model hubs have it edited, and nothing here reads it."""
    if path.name != CARD_NAME:
        return False
    try:
        found = path.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def is_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() or (entry.is_file() and entry.stat(follow_symlinks=False).st_nlink > 1)


def sha256(path: Path) -> str:
    """sha256 of a regular file, not of a link; about 0.3 s per 500 MB."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
