"""The speed targets and the measured values."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.table import markdown, megabytes
from benchmarks.speed.cases import Case
from benchmarks.speed.results import CACHED, Speed, Timings, ratio

PROMPT, GEN, SHALLOW, DEEP = 512, 128, 128, 896  # tokens: prefill, decoded, context before them (to 1024)
FASTEST = {"int8": ("openvino int8",), "int4": ("llama.cpp q4_0", "openvino int4")}
NONE = "-"


@dataclass(frozen=True)
class Row:
    """One line: `value` in the unit of `limit`; None if something it needs was not measured."""

    what: str
    limit: str
    value: float | None
    met: bool | None  # None: no target, or not measured

    def cells(self) -> list[str]:
        value = "not measured" if self.value is None else f"{self.value:.2f}x"
        if self.value is not None and "%" in self.limit:
            value = f"{100 * self.value:.1f} %"
        return [self.what, self.limit, value, NONE if self.met is None else "met" if self.met else "MISSED"]


class Figures:
    """The models of one run by name; there is no figure (None) where a model that it needs is missing."""

    def __init__(self, speeds: Sequence[Speed], evict: bool = False) -> None:
        """evict: the figures of decoding are those with the weights out of the caches."""
        self.by_name, self.evict = {speed.name: speed for speed in speeds}, evict

    def test(self, name: str, kind: str, deep: bool = False) -> Timings:
        """The prefill, or decoding at the shallow or the deep context."""
        evict = self.evict and kind == "tg"
        tests = [t for t in self.by_name[name].tests if t.case.kind == kind and t.case.evict == evict]
        return max(tests, key=lambda t: t.case.depth) if deep else min(tests, key=lambda t: t.case.depth)

    def case(self, name: str, kind: str, deep: bool = False) -> Case:
        return self.test(name, kind, deep).case

    def times(self, slow: str, fast: str) -> float | None:
        """Ratio of decode times of two models."""
        return self.faster(fast, slow)

    def faster(self, name: str, base: str, kind: str = "tg") -> float | None:
        """Ratio of tokens/s of two models, round by round."""
        if not {name, base} <= self.by_name.keys():
            return None
        return ratio(self.by_name[name], self.by_name[base], self.case(name, kind))

    def deeper(self, name: str) -> float | None:
        """Decode time at the deep context over decode time at the shallow one."""
        if name not in self.by_name:
            return None
        speed = self.by_name[name]
        return ratio(speed, speed, self.case(name, "tg"), self.case(name, "tg", deep=True))

    def of(self, name: str, figure: Callable[[Speed], float | None]) -> float | None:
        return figure(self.by_name[name]) if name in self.by_name else None


def rows(speeds: Sequence[Speed]) -> list[Row]:
    """All lines of the speed table."""
    figures, out = Figures(speeds), deployed_rows(speeds)
    schemes = [s for s in FASTEST if f"DMPT {s}" in figures.by_name]
    for scheme in schemes:
        ours = f"DMPT {scheme}"
        at_most(out, f"{ours}: decode time over GPT-2 {scheme}", 1.10, figures.times(ours, f"GPT-2 {scheme}"))
        at_most(out, f"{scheme}: switching always over never", 1.25,
                figures.times(f"DMPT always {scheme}", f"DMPT never {scheme}"))  # fmt: skip
        at_most(out, f"{scheme}: 16 heads over 8", 1.05, figures.times(f"DMPT 16 heads {scheme}", ours))
        for k in (64, 1024):
            say(out, f"{scheme}: K {k} over 256", figures.times(f"DMPT K={k} {scheme}", ours))
        at_most(out, f"DMPT with head deltas {scheme}: decode time over GPT-2 {scheme}", 1.10,
                figures.times(f"DMPT deltas {scheme}", f"GPT-2 {scheme}"))  # fmt: skip
        deep, shallow = (figures.case(ours, "tg", deep) for deep in (True, False))
        at_most(out, f"{ours}: decode time at context 1000 ({span(deep)}) over 128 ({span(shallow)})", 1.4,
                figures.deeper(ours))  # fmt: skip
        at_most(out, f"the same, int8 KV cache, {scheme}", 1.4, figures.deeper(f"DMPT int8 cache {scheme}"))
        for peer in FASTEST[scheme]:
            at_least(out, f"{ours}: tokens/s over {peer}", 1.0, figures.faster(ours, peer))
        if scheme == "int8":
            at_least(out, f"{ours}: prefill over openvino int8", 0.8, figures.faster(ours, "openvino int8", "pp"))
        share = figures.of(ours, lambda s: s.roof_share(Figures([s]).test(s.name, "tg")))
        at_least(out, f"{ours}: share of the memory roof", 0.6, share, "60 %")
        resident = figures.of(ours, lambda s: s.rss_bytes / s.size_bytes)
        at_most(out, f"{ours}: resident memory over file size", 1.3, resident)
        python = figures.of(ours, lambda s: Figures([s]).test(s.name, "tg").python_share)
        at_most(out, f"{ours}: Python in a step", 0.03, python, "3 %")
    return out


@dataclass(frozen=True)
class Limit:
    """What a DMPT must reach in a scheme. Times are over GPT-2's, or at context 1000 over 128."""

    memory: float  # decode time, weights from memory
    cached: float  # decode time, weights in the last-level cache
    deep: float
    peers: float  # tokens/s over the fastest peers', from memory


LIMITS = {"int8": Limit(1.08, 1.15, 1.35, 1.0), "int4": Limit(1.15, 1.25, 1.45, 0.95)}


def evicts(speeds: Sequence[Speed]) -> bool:
    """Whether decoding was also timed with the weights from memory."""
    return any(test.case.evict for speed in speeds for test in speed.tests)


def deployed_rows(speeds: Sequence[Speed]) -> list[Row]:
    """The lines of `init`'s default model, projected heads on one matrix."""
    out: list[Row] = []
    plain, evicted = Figures(speeds), Figures(speeds, evict=True)
    for scheme, limit in LIMITS.items():
        for model in ("DMPT one anchor 20 %", "DMPT one anchor", "DMPT one anchor never"):
            ours, gpt2 = f"{model} {scheme}", f"GPT-2 {scheme}"
            if not {ours, gpt2} <= plain.by_name.keys():
                continue
            own = plain.by_name[ours]
            if evicts(speeds):
                at_most(out, f"{ours}: decode time over {gpt2}, from memory", limit.memory, evicted.times(ours, gpt2))
                for peer in FASTEST[scheme]:
                    at_least(out, f"{ours}: tokens/s over {peer}, from memory", limit.peers, evicted.faster(ours, peer))
            where = own.weights(plain.test(ours, "tg"))
            if where == CACHED:
                at_most(out, f"{ours}: decode time over {gpt2}, cached", limit.cached, plain.times(ours, gpt2))
            else:
                say(out, f"{ours}: decode time over {gpt2}, {where or 'cache unknown'}", plain.times(ours, gpt2))
            at_most(out, f"{ours}: decode time at context 1000 over 128", limit.deep, plain.deeper(ours))
    return out


def span(case: Case) -> str:
    """Context range of the decoded tokens.

    >>> span(Case("tg", 128, 896))
    '896 to 1024'
    """
    return f"{case.depth} to {case.depth + case.tokens}"


def at_most(out: list[Row], what: str, limit: float, value: float | None, unit: str | None = None) -> None:
    out.append(Row(what, f"at most {unit or f'{limit:.2f}x'}", value, None if value is None else value <= limit))


def at_least(out: list[Row], what: str, limit: float, value: float | None, unit: str | None = None) -> None:
    out.append(Row(what, f"at least {unit or f'{limit:.2f}x'}", value, None if value is None else value >= limit))


def say(out: list[Row], what: str, value: float | None) -> None:
    out.append(Row(what, "say", value, None))


def report(speeds: Sequence[Speed], agreed: Mapping[str, Mapping[str, float]], absent: Sequence[str]) -> str:
    """The targets, then every model, as Markdown."""
    threads = speeds[0].threads
    rates = ", ".join(f"{statistics.median(r) / 1e9:.1f} GB/s on {t}" for t, r in speeds[0].read_bytes_per_s.items())
    read = f"; memory bandwidth {rates}" if rates else ""
    found = rows(speeds)
    missed = [row.what for row in found if row.met is False]
    lines = [
        f"## {threads} thread{'s' * (threads > 1)}",
        f"Medians of {len(speeds[0].tests[0].tokens_per_s)} interleaved rounds{read}.",
        markdown(["what", "must reach", "measured", ""], [row.cells() for row in found], left=2),
        f"Missed: {'; '.join(missed)}." if missed else "Nothing was missed.",
        everything(speeds, agreed),
        *wrong_switches(speeds),
        *absent,
    ]
    return "\n\n".join(lines)


def everything(speeds: Sequence[Speed], agreed: Mapping[str, Mapping[str, float]]) -> str:
    """Every model: tokens/s, and as multiples of Transformers in float32 if that was measured."""
    figures, base = Figures(speeds), "transformers fp32"
    evict, evicted = evicts(speeds), Figures(speeds, evict=True)
    head = ["model", "pp tokens/s", "x fp32", "tg tokens/s", "x fp32", "tg deep", "tg from memory", "roof", "python",
            "size", "resident", "touched", "KL", "same top"]  # fmt: skip
    table = []
    for speed in speeds:
        pp, tg, deep = (figures.test(speed.name, kind, d) for kind, d in (("pp", False), ("tg", False), ("tg", True)))
        said = agreed.get(speed.name, {})
        table.append([
            speed.name,
            rate(pp), times(figures.faster(speed.name, base, "pp")),
            rate(tg), times(figures.faster(speed.name, base)),
            rate(deep), rate(evicted.test(speed.name, "tg")) if evict else NONE,
            percent(speed.roof_share(tg)), percent(tg.python_share),
            *map(megabytes, (speed.size_bytes, speed.rss_bytes, speed.touched_bytes or 0)),
            f"{max(said['mean_kl'], 0):.4f}" if said else NONE, percent(said.get("same_top")),
        ])  # fmt: skip
    return markdown(head, table)


def wrong_switches(speeds: Sequence[Speed]) -> list[str]:
    """A line for each model whose routes differ from its design."""
    wanted = {"DMPT never": lambda t: t.switches == 0, "DMPT always": lambda t: t.switches == t.case.tokens - 1}
    return [
        f"{speed.name} switched {test.switches} times in {test.case.name}: ignore its lines."
        for speed in speeds
        for test in speed.tests
        for name, holds in wanted.items()
        if speed.name.startswith(name) and test.case.kind == "tg" and not holds(test)
    ]


def rate(test: Timings) -> str:
    return f"{statistics.median(test.tokens_per_s):.1f}"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f} %"
