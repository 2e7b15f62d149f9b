"""Naming noise: samples that scatter, and a machine that was busy."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from benchmarks.speed.results import quartiles
from runtime.threads import visible_cpus

UNSTEADY = 0.10  # of the median: the distance between the quartiles from which a figure is called unsteady
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
