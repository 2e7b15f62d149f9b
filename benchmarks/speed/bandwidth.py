"""Memory bandwidth of this machine: the upper limit of decoding, which reads each touched weight once per token.

numpy is imported when it is used: benchmarks.speed.worker must start in a Python that lacks a peer's packages, to name
them.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

MEMORY = Path("/proc/meminfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST = 256 << 20  # bytes, if the caches are unknown or small
MOST = 1 << 30  # bytes: a machine with that much cache has more free memory than the test needs


def buffer_bytes(caches: Path = CACHES, memory: Path = MEMORY) -> int:
    """A size that does not fit the last-level cache: 1.25 times that cache, from 256 MiB to 1 GiB.

    At most a quarter of the free memory; raises MemoryError when that would fit the cache.
    """
    largest = min(MOST, last_level_bytes(caches))
    room = available_bytes(memory) // 4
    if room <= largest:
        raise MemoryError(f"a quarter of the free memory, {room >> 20} MiB, is no larger than the caches")
    return min(MOST, max(LEAST, largest * 5 // 4), room)


def last_level_bytes(caches: Path = CACHES) -> int:
    """Size of the last-level cache; 0 if unknown."""
    return max((cache_bytes(file) for file in caches.glob("index*/size")), default=0)


def available_bytes(memory: Path = MEMORY) -> int:
    """Memory available without swapping: Linux's estimate, elsewhere the free pages, or no limit if unknown."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", memory.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * MOST  # unknown: allow the largest buffer


def cache_bytes(file: Path) -> int:
    """Parse a cache size as Linux writes it, `480M` or `2048K`; 0 if unreadable."""
    try:
        found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text(encoding="ascii").strip())
    except OSError:
        return 0
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0


class Reader:
    """Reads one buffer repeatedly; numpy releases the interpreter's lock meanwhile."""

    def __init__(self, size: int) -> None:
        """size: bytes. Raises MemoryError."""
        import numpy as np

        self.buffer = np.ones(size // 8, np.uint64)  # written, so that real pages back it

    def read(self, threads: int = 1) -> float:
        """One pass over the buffer, split among threads; its seconds. The `or` costs nothing compared with waiting for
        memory. Afterwards the last-level cache holds nothing else."""
        import numpy as np

        first, *others = np.array_split(self.buffer, threads)
        with ThreadPoolExecutor(max(1, threads - 1)) as pool:
            start = perf_counter()
            waiting = pool.map(np.bitwise_or.reduce, others)
            np.bitwise_or.reduce(first)  # in this thread, whose core's own caches are to be cleared too
            list(waiting)
            return perf_counter() - start

    def bytes_per_s(self, threads: int = 1) -> float:
        return self.buffer.nbytes / self.read(threads)
