"""How many threads this process may use: its CPU affinity, limited by its cgroup quota.

Containers limit CPU time, not visible CPUs. A runtime that starts a thread per visible CPU is then throttled: its
threads use up the quota by spinning for each other.
"""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import RequestError

V2_MOUNT = Path("/sys/fs/cgroup")
V1_MOUNTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpu,cpuacct"))
OWN_GROUPS = Path("/proc/self/cgroup")
MOST = 1024


def default_threads() -> int:
    """CPUs in this process's affinity mask, at most its cgroup quota rounded down, at least 1."""
    quota = cpu_quota()
    cpus = visible_cpus()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def resolve_threads(threads: int | None, deterministic: bool = False) -> int:
    """The given number, or the default for None. Raises RequestError unless it is from 1 to 1024.

    Splitting a sum between threads changes its last bits, so `deterministic` uses one thread and rejects other numbers.
    """
    if deterministic and threads not in (None, 1):
        raise RequestError(f"threads {threads!r} and deterministic exclude each other: deterministic uses one thread")
    if threads is None and deterministic:
        return 1
    if threads is None:
        return default_threads()
    if type(threads) is not int or not 1 <= threads <= MOST:
        raise RequestError(f"threads {threads!r} must be a whole number from 1 to {MOST}")
    return threads


def visible_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def cpu_quota(
    groups: Path = OWN_GROUPS, v2_mount: Path = V2_MOUNT, v1_mounts: tuple[Path, ...] = V1_MOUNTS
) -> float | None:
    """CPU time that the cgroups allow, in CPUs, the lowest limit of all levels; None: no limit.

    Source: Linux kernel documentation, cgroup-v2 `cpu.max` and the v1 CFS bandwidth files.
    """
    quotas = []
    for hierarchy, controllers, path in own_groups(groups):
        if hierarchy == "0":
            quotas += [v2_quota(folder) for folder in levels(v2_mount, path)]
        elif "cpu" in controllers.split(","):
            quotas += [v1_quota(folder) for mount in v1_mounts for folder in levels(mount, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def own_groups(groups: Path) -> list[tuple[str, str, str]]:
    """(hierarchy id, controllers, path) of every line of /proc/self/cgroup."""
    lines = [line.split(":", 2) for line in read(groups).splitlines()]
    return [(line[0], line[1], line[2]) for line in lines if len(line) == 3]


def levels(mount: Path, path: str) -> list[Path]:
    """The group's folder and its parents up to the mount. A container may see only its own group, as the mount."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def v2_quota(folder: Path) -> float | None:
    quota, _, period = read(folder / "cpu.max").partition(" ")  # "max 100000" or "150000 100000"
    return ratio(quota, period)


def v1_quota(folder: Path) -> float | None:
    return ratio(read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us"))  # -1: no limit


def ratio(quota: str, period: str) -> float | None:
    try:
        allowed, each = int(quota), int(period)
    except ValueError:
        return None
    return allowed / each if allowed > 0 and each > 0 else None


def read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):  # no such controller here: no limit from it
        return ""
