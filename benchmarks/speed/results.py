"""The timings of one model, and the figures computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.cases import Case

FROM_MEMORY, CACHED, PARTLY_CACHED = "from memory", "cached", "partly cached"
FASTER = 1.2  # read rate of a last-level cache over memory's, at least, where it is there for this machine alone


@dataclass(frozen=True)
class Timings:
    """One test of one model; samples are in the order of the rounds."""

    case: Case
    tokens_per_s: list[float]
    native_share: list[float] = field(default_factory=list)  # share of the time spent outside Python; empty: unknown
    switches: int = 0  # leaf switches between the generated tokens of the last round

    @property
    def python_share(self) -> float | None:
        """Median share of a step spent in Python."""
        return 1 - statistics.median(self.native_share) if self.native_share else None


@dataclass(frozen=True)
class Speed:
    """Timings of one model."""

    name: str
    tests: list[Timings]
    load_s: list[float]  # load time of each fresh process
    rss_bytes: int  # resident at the end, of the process that loaded, prefilled and decoded
    peak_rss_bytes: int  # peak of that process
    size_bytes: int
    threads: int
    touched_bytes: int | None = None  # bytes of weights that one decoding step reads
    read_bytes_per_s: Mapping[int, list[float]] = field(default_factory=dict)  # threads -> bandwidth of each round
    idle_cpu_s: float = field(default=0.0)  # CPU time used during the turns of other models
    load_average: float | None = None  # of the machine before timing began
    cache_bytes: int = 0  # size of the last-level cache; 0: unknown
    cached_bytes_per_s: Mapping[int, list[float]] = field(default_factory=dict)  # threads -> read rate of that cache
    cold_load_s: list[float] = field(default_factory=list)  # with the files outside the page cache; empty: not measured

    @classmethod
    def of(
        cls,
        name: str,
        turns: Mapping[Case, Sequence[Mapping[str, Any]]],
        load_s: list[float],
        fact: Mapping[str, Any],
        size_bytes: int,
        touched_bytes: int | None = None,
        read_bytes_per_s: Mapping[int, list[float]] | None = None,
        cold_load_s: list[float] | None = None,
    ) -> Speed:
        """From a worker's replies: `turns` by test, `fact` at load and end."""
        tests = [
            Timings(
                case,
                [case.tokens / turn["seconds"] for turn in replies],
                [t["native_s"] / t["seconds"] for t in replies if t.get("native_s") is not None],
                replies[-1].get("switches", 0),
            )
            for case, replies in turns.items()
        ]
        own = {key: fact[key] for key in ("rss_bytes", "peak_rss_bytes", "threads", "idle_cpu_s")}
        return cls(
            name, tests, load_s, size_bytes=size_bytes, touched_bytes=touched_bytes,
            read_bytes_per_s=read_bytes_per_s or {}, cold_load_s=cold_load_s or [], **own,
        )  # fmt: skip

    def first(self, kind: str) -> Timings:
        """The first test of a kind, pp or tg."""
        return next(test for test in self.tests if test.case.kind == kind)

    def roof_share(self, test: Timings) -> float | None:
        """Median share of memory bandwidth that decoding uses: bytes touched x tokens/s / bandwidth."""
        rates = self.read_bytes_per_s.get(self.threads)
        if test.case.kind != "tg" or not rates or not self.touched_bytes:
            return None
        return statistics.median(
            self.touched_bytes * done / rate for done, rate in zip(test.tokens_per_s, rates, strict=True)
        )

    def weights(self, test: Timings) -> str | None:
        """Where the weights of a decoding test came from; None for a prefill and where a size is unknown."""
        if test.case.evict:
            return FROM_MEMORY
        if test.case.kind != "tg" or not self.touched_bytes or not self.cache_bytes:
            return None
        # a cache that other machines of the host use too may be as slow as memory
        own, memory = self.cached_bytes_per_s.get(self.threads), self.read_bytes_per_s.get(self.threads)
        shared = own and memory and statistics.median(own) < FASTER * statistics.median(memory)
        return CACHED if self.touched_bytes <= self.cache_bytes and not shared else PARTLY_CACHED

    def to_json(self, base: Speed | None = None) -> dict[str, Any]:
        """All figures; the first pp and tg tests also under their own names, all tests under "tests".

        base: the model that ratios refer to.
        """
        prefill, decode = self.first("pp"), self.first("tg")
        return {
            **spread("decode_tokens_per_s", decode.tokens_per_s),
            **spread("prefill_tokens_per_s", prefill.tokens_per_s),
            **spread("load_s", self.load_s),
            **(spread("cold_load_s", self.cold_load_s) if self.cold_load_s else {}),
            **spread("peak_rss_bytes", [self.peak_rss_bytes]),  # of one process; the same keys as every figure
            "rss_bytes": self.rss_bytes,
            "size_bytes": self.size_bytes,
            "threads": self.threads,
            "prompt_tokens": prefill.case.tokens,
            "generated_tokens": decode.case.tokens,
            "repetitions": len(decode.tokens_per_s),
            "switches": decode.switches,
            "idle_cpu_s": self.idle_cpu_s,
            "load_average": self.load_average,
            "touched_bytes": self.touched_bytes,
            "read_bytes_per_s": {str(t): statistics.median(rates) for t, rates in self.read_bytes_per_s.items()},
            "cache_bytes": self.cache_bytes,
            "cached_bytes_per_s": {str(t): statistics.median(rates) for t, rates in self.cached_bytes_per_s.items()},
            "tests": [self.test_json(test, base) for test in self.tests],
        }

    def test_json(self, test: Timings, base: Speed | None = None) -> dict[str, Any]:
        return {
            "test": test.case.name,
            "tokens": test.case.tokens,
            "depth": test.case.depth,
            **spread("tokens_per_s", test.tokens_per_s),
            "samples": test.tokens_per_s,
            "ratio": ratio(self, base, test.case) if base else None,
            "weights": self.weights(test),
            "evict": test.case.evict,
            "roof_share": self.roof_share(test),
            "python_share": test.python_share,
            "switches": test.switches,
        }


def ratio(speed: Speed, base: Speed, case: Case, base_case: Case | None = None) -> float:
    """Speed relative to `base`: the median over rounds of the ratio within a round.

    base_case: the test of `base` to compare with; a different test compares a model with itself.
    """
    mine, its = (
        next(test.tokens_per_s for test in s.tests if test.case == c)
        for s, c in ((speed, case), (base, base_case or case))
    )
    return statistics.median(a / b for a, b in zip(mine, its, strict=True))


def spread(name: str, samples: Sequence[float]) -> dict[str, float]:
    """Median under `name`, quartiles under `name`_q1 and `name`_q3, extremes under `name`_min and `name`_max."""
    low, high = quartiles(samples)
    return {
        name: statistics.median(samples),
        f"{name}_q1": low,
        f"{name}_q3": high,
        f"{name}_min": min(samples),
        f"{name}_max": max(samples),
    }


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile: a single disturbed round does not move them.

    >>> quartiles([1, 2, 3, 4, 100]), quartiles([7])
    ((2.0, 4.0), (7, 7))
    """
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high
