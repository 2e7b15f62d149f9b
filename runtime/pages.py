"""Weights in large pages, on Linux.

A step of decoding reads all weights, and in pages of 4 kB it also waits for their addresses: on a virtual machine 4 to
14 % of the step. What ONNX Runtime allocates for a session is not asked to be in large pages, so the system is asked
afterwards, for what has been added meanwhile. Nothing changes where it cannot do that (Linux before 6.1), or was told
not to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

COLLAPSE = 25  # MADV_COLLAPSE of madvise(2): move what is there into large pages, now
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS = Path("/proc/self/maps")
Range = tuple[int, int]  # first address, and the one behind the last


@contextmanager
def large_pages() -> Iterator[None]:
    """Memory that is allocated inside, by any thread, is in large pages afterwards, as far as that is possible."""
    size, before = page_size(), own_memory()
    yield
    if size:
        for first, end in added(before, own_memory()):
            first, end = -(-first // size) * size, end // size * size
            if first < end:  # a refusal leaves everything as it was
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), COLLAPSE)


def page_size() -> int:
    """Bytes of a large page; 0 where there are none, or none are wanted."""
    try:
        wanted = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii")) if wanted else 0
    except (OSError, ValueError):
        return 0


def own_memory() -> list[Range]:
    """Where this process has memory that no file stands behind; nothing where the system does not say."""
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
    """The parts of `after` that were not in `before`; each is ordered and does not overlap itself.

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
