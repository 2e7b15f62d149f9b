"""Large pages: which memory is moved, that its content stays, and that nothing happens where it is impossible."""

import ctypes
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import pages


def whole_ranges(cells: set[int]) -> list[pages.Range]:
    """Cells, each [i, i + 1), as ordered ranges that do not touch."""
    starts = sorted(i for i in cells if i - 1 not in cells)
    ends = sorted(i + 1 for i in cells if i + 1 not in cells)
    return list(zip(starts, ends, strict=True))


@given(st.sets(st.integers(0, 12)), st.sets(st.integers(0, 12)))
def test_added_is_the_difference_of_sets(before, after):
    found = pages.added(whole_ranges(before), whole_ranges(after))
    assert [i for first, end in found for i in range(first, end)] == sorted(after - before)


def large_bytes(address: int) -> int:
    """AnonHugePages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def test_memory_made_inside_is_in_large_pages_and_keeps_its_content():
    size = pages.page_size()
    if not size or size > 64 << 20:
        pytest.skip("this system has no large pages")
    with pages.large_pages():
        # certainly new memory, with two whole pages at any start address
        mapped = mmap.mmap(-1, 3 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        made = np.frombuffer(mapped, np.uint8)
        made[:] = np.arange(3 * size, dtype=np.uint8)
    assert np.array_equal(made, np.arange(3 * size, dtype=np.uint8))
    first = -(-made.ctypes.data // size) * size
    found = large_bytes(first)
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(2 * size), pages.COLLAPSE):
        pytest.skip("this system makes none on request now")
    assert found >= 2 * size


@pytest.mark.parametrize("text", ["always madvise [never]", None])
def test_nothing_is_asked_where_there_are_none(text, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    if text:
        (tmp_path / "enabled").write_text(text)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(pages.ctypes, "CDLL", None)  # calling it would fail
    with pages.large_pages():
        made = np.ones(8 << 20, np.uint8)
    assert made.all()


def test_without_a_map_of_memory_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MAPS", tmp_path / "none")
    monkeypatch.setattr(pages.ctypes, "CDLL", None)
    with pages.large_pages():
        pass


def resident(address: int) -> int:
    """Bytes in memory of the mapping that starts at an address."""
    lines = Path("/proc/self/smaps").read_bytes().decode(errors="replace").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{address:x}-"))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:")) * 1024


@pytest.mark.skipif(not pages.DETAILS.exists(), reason="this system does not list mappings")
@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("name", ["a file.data", "odd\x85\u2028\r name"])
def test_pages_of_a_file_are_forgotten_unless_they_were_changed(change, name, tmp_path):
    path, size = tmp_path / name, 16 * mmap.PAGESIZE
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    path.write_bytes(content.tobytes())
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), np.uint8)
    expected = content.copy()
    assert mapped.sum(dtype=np.int64) == content.sum(dtype=np.int64)  # every page was read
    if change:
        mapped[5] = expected[5] = content[5] ^ 1
    assert pages.own_memory()
    pages.forget_files([tmp_path / "another", path])
    assert resident(mapped.ctypes.data) == (size if change else 0)
    assert np.array_equal(mapped, expected)
