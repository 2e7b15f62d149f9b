"""Figures for Prometheus, in its text format."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Histogram:
    """Counts of values at most as large as each bound."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(SECONDS, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        bounds = [*map(str, SECONDS), "+Inf"]
        totals = [*accumulate(self.counts)]
        buckets = [f'{name}_bucket{{le="{le}"}} {total}' for le, total in zip(bounds, totals, strict=True)]
        return [*buckets, f"{name}_sum {self.sum:.6f}", f"{name}_count {totals[-1]}"]


class Metrics:
    """All counters; only the event loop's thread changes them."""

    def __init__(self) -> None:
        self.started = time.time()
        self.answers: Counter[int] = Counter()  # by status
        self.prompt_tokens = self.new_tokens = self.cancelled = 0
        self.seconds, self.first_token = Histogram(), Histogram()

    def text(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> str:
        """The page; gauges and counters: further values by name."""
        lines = ["# TYPE dmpt_requests_total counter"]
        lines += [f'dmpt_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.answers.items())]
        own = {
            "dmpt_prompt_tokens_total": self.prompt_tokens, "dmpt_new_tokens_total": self.new_tokens,
            "dmpt_texts_cancelled_total": self.cancelled,
        }  # fmt: skip
        for name, value in {**own, **counters}.items():
            lines += [f"# TYPE {name} counter", f"{name} {value:.10g}"]
        process = {"process_start_time_seconds": self.started, "process_resident_memory_bytes": resident_bytes()}
        for name, value in {**gauges, **process}.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:.10g}"]
        for name, histogram in (
            ("dmpt_request_seconds", self.seconds),
            ("dmpt_first_token_seconds", self.first_token),
        ):
            lines += [f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say it in /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
