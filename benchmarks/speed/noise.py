"""Naming noise: samples that scatter, a machine that was busy, and one whose speed drifted."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from benchmarks.speed.results import Speed, quartiles
from runtime.threads import visible_cpus

UNSTEADY = 0.10  # of the median: the distance between the quartiles from which a figure is called unsteady
DRIFT = 0.10  # change from the first rounds to the last that is mentioned
FEWEST = 4  # rounds from which a drift can be told from a single disturbed round
SPARE = 0.5  # processes above the number of cores that do not count as busy: a load average trails behind


def scatter(samples: Sequence[float]) -> float:
    """Distance between the quartiles as a share of the median.

    >>> round(scatter([90.0, 100.0, 110.0]), 3)
    0.1
    """
    low, high = quartiles(samples)
    return (high - low) / statistics.median(samples)


def mark(samples: Sequence[float]) -> str:
    """What stands behind a number that scatters.

    >>> mark([100.0, 101.0, 99.0]), mark([50.0, 100.0, 150.0])
    ('', ' (unsteady)')
    """
    return " (unsteady)" if scatter(samples) > UNSTEADY else ""


def load_average() -> float | None:
    """Processes that wanted to run during the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy(load: float | None, cores: int | None = None) -> str | None:
    """A remark about a machine that had other work before timing began; None when it had not.

    >>> busy(5.1, 2), busy(1.9, 2), busy(None, 2)
    ('the machine was busy: load 5.1 on 2 cores before timing began', None, None)
    """
    cores = visible_cpus() if cores is None else cores
    if load is None or load <= cores + SPARE:
        return None
    return f"the machine was busy: load {load:.1f} on {cores} core{'s' * (cores > 1)} before timing began"


def drift(speeds: Sequence[Speed]) -> str | None:
    """A remark about a machine that became faster or slower while it timed `speeds`, of one schedule; else None.

    Frequencies are no help: virtual machines report a constant one. The rounds are: all models take turns in each, so
    a change of the machine moves every model the same way, and a change of a model moves only that one.
    """
    changes = [change(speed) for speed in speeds]
    if not changes or min(map(abs, changes)) <= DRIFT or len({c > 0 for c in changes}) > 1:
        return None
    middle = statistics.median(changes)
    word = "faster" if middle > 0 else "slower"
    return f"the machine's speed drifted: the last rounds were {abs(middle):.0%} {word} than the first"


def change(speed: Speed) -> float:
    """By how much a model's last rounds are faster than its first, as a share; 0 where single rounds overlap.

    The first and the last third count, but two rounds at least. Every round at one end must beat every round at the
    other: a single disturbed round is scatter.
    """
    tests = [test.tokens_per_s for test in speed.tests]
    relative = [[sample / statistics.median(samples) for sample in samples] for samples in tests]
    rounds = [statistics.median(of_round) for of_round in zip(*relative, strict=True)]
    if len(rounds) < FEWEST:
        return 0.0
    part = max(2, len(rounds) // 3)
    first, last = rounds[:part], rounds[-part:]
    if min(first) <= max(last) and min(last) <= max(first):
        return 0.0
    return statistics.median(last) / statistics.median(first) - 1
