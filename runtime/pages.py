"""Memory of the weights, on Linux: large pages for what ONNX Runtime keeps, and none for files that it has read.

A decoding step reads all weights. With 4 kB pages it also waits for address translation: 4 to 14 % of the step on a
virtual machine. ONNX Runtime does not request large pages for a session's memory, so this module requests them
afterwards, for the memory added meanwhile. Nothing changes where Linux cannot do that (before 6.1) or large pages are
switched off.

Weights come from a mapped file, and most kernels keep a copy of their own. The file's pages are then only read again
for rows of the embedding, but count as the process's memory until the system needs them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

DONTNEED = 4  # MADV_DONTNEED: unmap pages now; those of a file that were not changed are read again when needed
COLLAPSE = 25  # MADV_COLLAPSE of madvise(2): move existing memory into large pages now
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, DETAILS = Path("/proc/self/maps"), Path("/proc/self/smaps")
Range = tuple[int, int]  # first address, and one past the last


@contextmanager
def large_pages() -> Iterator[None]:
    """Afterwards, move memory that any thread allocated inside the block into large pages, where possible."""
    size, before = page_size(), own_memory()
    yield
    if size:
        for first, end in added(before, own_memory()):
            first, end = -(-first // size) * size, end // size * size
            if first < end:  # a refusal changes nothing
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), COLLAPSE)


def forget_files(paths: Iterable[Path]) -> None:
    """Unmap the pages of files that this process has mapped and not changed."""
    for first, end in clean_mappings({str(path.resolve()) for path in paths}):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), DONTNEED)


def clean_mappings(paths: set[str]) -> list[Range]:
    """Where files are mapped without pages of the process's own; empty where the system does not list mappings."""
    found, mapped = [], None
    for line in lines_of(DETAILS):  # 7f00c000-7f00e000 r--p 00000000 08:01 1234    /models/device/model.onnx.data
        field, *values = line.split(maxsplit=5)
        if not field.endswith(":"):
            first, end = field.split("-")
            mapped = (int(first, 16), int(end, 16)) if paths.intersection(values[4:]) else None
        elif mapped and field == "Anonymous:" and values[0] == "0":
            found.append(mapped)
    return found


def lines_of(path: Path) -> list[str]:
    """Lines of a file of the system, none if it cannot be read; names in them may hold any characters but a newline."""
    try:
        return [os.fsdecode(line) for line in path.read_bytes().split(b"\n") if line]
    except OSError:
        return []


def page_size() -> int:
    """Bytes of a large page; 0 where they are unavailable or switched off."""
    try:
        wanted = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii")) if wanted else 0
    except (OSError, ValueError):
        return 0


def own_memory() -> list[Range]:
    """Address ranges of this process's anonymous memory; empty where the system does not list them."""
    found = []
    for line in lines_of(MAPS):  # 7f00c000-7f00e000 rw-p 00000000 00:00 0    [heap]
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            first, end = addresses.split("-")
            found.append((int(first, 16), int(end, 16)))
    return found


def added(before: Iterable[Range], after: Iterable[Range]) -> list[Range]:
    """The parts of `after` that are not in `before`; both are ordered, without overlaps.

    >>> added([(0, 4), (6, 8)], [(0, 10), (20, 30)])
    [(4, 6), (8, 10), (20, 30)]
    """
    out = []
    for first, end in after:
        for low, high in before:
            if low < end and high > first:
                if low > first:
                    out.append((first, low))
                first = max(first, high)
        if first < end:
            out.append((first, end))
    return out
