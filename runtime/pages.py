"""Large pages for weights, on Linux.

A decoding step reads all weights. With 4 kB pages it also waits for address translation: 4 to 14 % of the step on a
virtual machine. ONNX Runtime does not request large pages for a session's memory, so this module requests them
afterwards, for the memory added meanwhile. Nothing changes where Linux cannot do that (before 6.1) or large pages are
switched off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

COLLAPSE = 25  # MADV_COLLAPSE of madvise(2): move existing memory into large pages now
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS = Path("/proc/self/maps")
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


def page_size() -> int:
    """Bytes of a large page; 0 where they are unavailable or switched off."""
    try:
        wanted = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii")) if wanted else 0
    except (OSError, ValueError):
        return 0


def own_memory() -> list[Range]:
    """Address ranges of this process's anonymous memory; empty where the system does not list them."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # 7f00c000-7f00e000 rw-p 00000000 00:00 0    [heap]
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
