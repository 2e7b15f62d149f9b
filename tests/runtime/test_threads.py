"""Thread counts from affinity and control groups, on planted files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import runtime.threads as threads
from runtime.errors import RequestError


def plant(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def quota(root: Path, groups: str, files: dict[str, str]) -> float | None:
    plant(root, {"groups": groups, **files})
    return threads.cpu_quota(root / "groups", root / "v2", (root / "v1",))


def test_v2_takes_the_tightest_level(tmp_path: Path) -> None:
    files = {
        "v2/cpu.max": "max 100000\n",
        "v2/a/cpu.max": "250000 100000\n",
        "v2/a/b/cpu.max": "600000 100000\n",
        "v2/other/cpu.max": "1000 100000\n",
    }
    assert quota(tmp_path, "0::/a/b\n", files) == 2.5


def test_v2_in_a_container_that_sees_its_own_group_as_the_mount(tmp_path: Path) -> None:
    assert quota(tmp_path, "0::/docker/1234\n", {"v2/cpu.max": "150000 100000\n"}) == 1.5


def test_v1(tmp_path: Path) -> None:
    groups = "9:name=systemd:/\n3:cpu,cpuacct:/pod\n2:cpuset:/pod\n"
    files = {"v1/pod/cpu.cfs_quota_us": "300000", "v1/pod/cpu.cfs_period_us": "100000", "v1/cpu.cfs_quota_us": "-1"}
    assert quota(tmp_path, groups, files) == 3.0


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("", {}),
        ("0::/\n", {"v2/cpu.max": "max 100000\n"}),
        ("0::/\n", {"v2/cpu.max": "nonsense"}),
        ("0::/\n", {"v2/cpu.max": "100000 0"}),
        ("1:cpu:/\n", {"v1/cpu.cfs_quota_us": "-1\n", "v1/cpu.cfs_period_us": "100000\n"}),
        ("1:cpuset:/\n", {"v1/cpu.cfs_quota_us": "1\n", "v1/cpu.cfs_period_us": "100000\n"}),
        ("garbage\n", {}),
    ],
)
def test_no_limit(groups: str, files: dict[str, str], tmp_path: Path) -> None:
    assert quota(tmp_path, groups, files) is None


@pytest.mark.parametrize(("cpus", "limit", "want"), [(8, None, 8), (8, 2.7, 2), (8, 0.4, 1), (2, 16.0, 2)])
def test_default_threads(cpus: int, limit: float | None, want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "visible_cpus", lambda: cpus)
    monkeypatch.setattr(threads, "cpu_quota", lambda: limit)
    assert threads.default_threads() == want
    assert threads.resolve_threads(None) == want
    assert threads.resolve_threads(7) == 7


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_is_respected() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert threads.default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, 100000])
def test_bad_thread_counts_are_refused(value: object) -> None:
    with pytest.raises(RequestError, match="threads"):
        threads.resolve_threads(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("cpus", [1, 2, 64])
def test_deterministic_means_one_thread(cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "default_threads", lambda: cpus)
    assert (threads.resolve_threads(None, True), threads.resolve_threads(1, True)) == (1, 1)
    assert threads.resolve_threads(None) == cpus
    for refused in (2, 0, "1"):
        with pytest.raises(RequestError, match="deterministic"):
            threads.resolve_threads(refused, True)  # type: ignore[arg-type]
