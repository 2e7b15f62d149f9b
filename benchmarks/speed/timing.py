"""Fair timing of prefill and decoding.

Every model runs in its own fresh process (benchmarks.speed.worker), and all take turns in one interleaved schedule,
A B C A B C ... for each test of each round, so other load on the machine affects all of them equally. Same prompt, same
number of threads, one warm-up round that does not count, medians with their quartiles.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.quality.scorer import kind_of, onnx_size
from benchmarks.speed.bandwidth import buffer_bytes, last_level_bytes
from benchmarks.speed.cases import Case, Workload
from benchmarks.speed.noise import load_average
from benchmarks.speed.processes import Worker, WorkerFailed, worker
from benchmarks.speed.results import Speed
from runtime.manifest_file import read_manifest
from training.errors import FieldError, InputError
from training.progress import Bar

DMPT_ONNX = "benchmarks.peers.adapters.dmpt_onnx"
SEED = 0  # of the random prompt, used without a text
SETTLE_S = 0.03  # between turns: thread pools spin for some milliseconds after their last run


@dataclass(frozen=True)
class Target:
    """A model to be timed."""

    name: str
    path: str
    adapter: str = DMPT_ONNX  # module with load(path, threads, device); see benchmarks.peers.adapters
    size_bytes: int = 0
    touched_bytes: int | None = None  # bytes of weights that one decoding step reads; None: unknown
    python: str | None = None  # interpreter of its process; None: this one

    def process(self) -> Any:
        return worker(self.name, self.python)


@dataclass(frozen=True)
class Schedule:
    """Numbers of repetitions."""

    repetitions: int = 5  # measured rounds, after one warm-up round
    loads: int = 1  # fresh processes whose load time is measured, including the one that is timed
    cold: int = 0  # further processes that load with the model's files dropped from the page cache
    roof: bool = False  # after each round, measure memory bandwidth with one thread and with the first target's threads


def target(name: str, path: str | Path) -> Target:
    """A model to be timed. Raises InputError unless it is an ONNX folder."""
    if kind_of(path) != "onnx":
        if not Path(path).exists():
            raise InputError(f"{path} does not exist: give a folder made by `dmpt-export onnx`")
        raise InputError(
            f"{path} is not an ONNX folder, so it cannot be timed: export it first: dmpt-export onnx {path} OUT"
        )
    touched: int = read_manifest(Path(path)).raw["bytes_touched_per_token"]
    return Target(name, str(path), size_bytes=onnx_size(path), touched_bytes=touched)


def measure(
    targets: Sequence[Target],
    workload: Workload | None = None,
    schedule: Schedule | None = None,
    threads: int | None = None,
    device: str = "cpu",
    *,
    text: Sequence[int] | None = None,
    failures: dict[str, str] | None = None,
) -> list[Speed]:
    """Time all targets in one interleaved schedule.

    Raises InputError for a workload that does not fit the smallest context.
    threads: None lets each adapter choose (the runtime uses all CPUs available to this process).
    text: token ids for the prompts; by default, and if it is too short, random ids.
    failures: filled with name -> reason of every failed target; the others continue, and only they are returned.
    Without it WorkerFailed is raised, with the exit code of the failed process.
    """
    workload, schedule = workload or Workload(), schedule or Schedule()
    crashed, load = Crashes(failures), load_average()
    evict = evicting_bytes() if workload.evict else 0
    cold_s: dict[str, list[float]] = {}
    load_s: dict[str, list[float]] = {}
    players: dict[str, tuple[Worker, dict[str, Any]]] = {}  # name -> its process and its reply to "load"
    for t in targets:
        with crashed.noted(t.name):
            cold_s[t.name] = [start_and_stop(t, threads, device, cold=True) for _ in range(schedule.cold)]
            load_s[t.name] = [start_and_stop(t, threads, device) for _ in range(schedule.loads - 1)]
    with ExitStack() as stack:
        for t in crashed.left(targets):
            with crashed.noted(t.name):
                w = stack.enter_context(t.process())
                players[t.name] = w, w.ask(do="load", adapter=t.adapter, path=t.path, threads=threads, device=device)
                load_s[t.name].append(players[t.name][1]["load_s"])
        if not players:
            return []
        facts = [fact for _, fact in players.values()]
        context = min(fact["context"] for fact in facts)
        tests = workload.cases(context)
        longest = max(max(case.tokens, case.depth) for case in tests)
        ids = prompt_ids(longest, min(fact["vocab_size"] for fact in facts), text)
        roof = Roof(stack.enter_context(worker("memory")), sorted({1, facts[0]["threads"]})) if schedule.roof else None
        rounds = play(
            {name: w for name, (w, _) in players.items()}, tests, ids, schedule.repetitions, roof, crashed, evict
        )
        for name in [*rounds]:
            with crashed.noted(name):
                players[name][1].update(players[name][0].ask(do="finish"))
    speeds = [
        Speed.of(
            t.name, rounds[t.name], load_s[t.name], players[t.name][1], t.size_bytes, t.touched_bytes,
            roof.seen if roof else {}, cold_s[t.name],
        )
        for t in crashed.left(targets)
    ]  # fmt: skip
    cached = {t: rates for t, rates in roof.cached.items() if rates} if roof else {}
    size = last_level_bytes() if device == "cpu" else 0
    return [
        dataclasses.replace(speed, load_average=load, cache_bytes=size, cached_bytes_per_s=cached) for speed in speeds
    ]


class Crashes:
    """Collects failures with their reasons; without a dict to fill, a failure is raised."""

    def __init__(self, failures: dict[str, str] | None) -> None:
        self.failures = failures

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        try:
            yield
        except WorkerFailed as error:
            if self.failures is None:
                raise
            self.failures[name] = str(error)

    def left(self, targets: Sequence[Target]) -> list[Target]:
        return [t for t in targets if t.name not in (self.failures or {})]


class Roof:
    """Memory reads between the rounds, in their own process."""

    def __init__(self, memory: Worker, threads: Sequence[int]) -> None:
        self.memory, self.size = memory, 0
        self.seen: dict[int, list[float]] = {t: [] for t in threads}  # threads -> bytes/s of each round
        self.cached: dict[int, list[float]] = {t: [] for t in threads}  # the same, from the last-level cache

    def read(self) -> None:
        """Measure once. If memory is too short, print a line to standard error and stop measuring."""
        try:
            for threads, rates in self.seen.items():
                self.size = self.size or buffer_bytes()
                rates.append(self.memory.ask(do="read", size=self.size, threads=threads)["bytes_per_s"])
                if half := last_level_bytes() // 2:
                    found = self.memory.ask(do="read", size=half, threads=threads, passes=3)
                    self.cached[threads].append(found["bytes_per_s"])
        except (MemoryError, WorkerFailed) as error:
            tqdm.write(f"the roof is not measured: {error}", file=sys.stderr)
            self.seen, self.cached = {}, {}


def play(
    workers: Mapping[str, Worker],
    tests: Sequence[Case],
    ids: list[int],
    repetitions: int,
    memory: Roof | None,
    crashed: Crashes,
    evict: int = 0,
) -> dict[str, dict[Case, list[dict[str, Any]]]]:
    """The interleaved schedule: for each worker that survives, its replies by test, without the warm-up."""
    turns: dict[str, dict[Case, list[dict[str, Any]]]] = {name: {case: [] for case in tests} for name in workers}
    with Bar(total=(1 + repetitions) * len(workers) * len(tests), desc="bench", unit="turn") as bar:
        for number in range(1 + repetitions):
            if memory is not None and number > 1 and turns:
                with crashed.noted(last := [*turns][-1]):
                    turn(
                        workers[last], tests[-1], ids, evict
                    )  # untimed: brings the caches to the state before any other turn
            for case in tests:
                for name in [*turns]:
                    bar.set_postfix_str(f"{name} {case.name}", refresh=True)
                    time.sleep(SETTLE_S if len(workers) > 1 else 0)
                    done = False
                    with crashed.noted(name):
                        turns[name][case].append(turn(workers[name], case, ids, evict))
                        done = True
                    if not done:
                        del turns[name]
                    bar.update()
            if memory is not None and number:
                memory.read()
    return {name: {case: replies[1:] for case, replies in mine.items()} for name, mine in turns.items()}


def evicting_bytes() -> int:
    """What is read before every evicted step. Raises InputError when memory is too short."""
    try:
        return buffer_bytes()
    except MemoryError as error:
        raise FieldError("{evict} has too little free memory: {}", error) from error


def turn(w: Worker, case: Case, ids: list[int], evict: int = 0) -> dict[str, Any]:
    """Run one test once: {"seconds", and for tg "native_s" (None: unknown) and leaf "switches"}."""
    if case.kind == "pp":
        return {"seconds": w.ask(do="prefill", ids=ids[: case.tokens])["seconds"]}
    reply = w.ask(do="decode", ids=ids[: case.depth], n=case.tokens, evict=evict if case.evict else 0)
    switches = int(np.count_nonzero(np.diff(reply["routes"])))
    return {"seconds": reply["seconds"], "native_s": reply["native_s"], "switches": switches}


def prompt_ids(n: int, vocab_size: int, text: Sequence[int] | None) -> list[int]:
    if text is not None and len(text) >= n:
        return [int(i) for i in text[:n]]
    return np.random.default_rng(SEED).integers(0, vocab_size, n).tolist()


def start_and_stop(t: Target, threads: int | None, device: str, cold: bool = False) -> float:
    """Load time in a fresh process that does nothing else; cold: with the model's files outside the page cache."""
    with t.process() as w:
        if cold:
            drop_from_cache(Path(t.path))
        seconds: float = w.ask(do="load", adapter=t.adapter, path=t.path, threads=threads, device=device)["load_s"]
        return seconds


def drop_from_cache(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that they are read from disk again; only works on Linux."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
