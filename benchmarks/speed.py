"""How fast models prefill and decode, timed fairly.

Every model runs in a fresh process of its own (benchmarks.worker), and all take turns in one interleaved
schedule, A B C A B C ... for each test of each round: whatever else the machine does hits all of them alike. Same
prompt, same number of threads, one warm-up round that does not count, medians with the least and the greatest value.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.bandwidth import buffer_bytes
from benchmarks.cases import Case, cases
from benchmarks.processes import Worker, WorkerFailed, worker
from benchmarks.results import Speed
from benchmarks.scorer import kind_of, onnx_size
from runtime.manifest import read_manifest
from training.errors import InputError

DMPT_ONNX = "benchmarks.adapters.dmpt_onnx"
SEED = 0  # of the random prompt used when no text is given
SETTLE_S = 0.03  # between turns: thread pools spin for some milliseconds after their last run


@dataclass(frozen=True)
class Target:
    """A model to be timed."""

    name: str
    path: str
    adapter: str = DMPT_ONNX  # module with load(path, threads, device); see benchmarks.adapters
    size_bytes: int = 0
    touched_bytes: int | None = None  # of weights, by one decoding step; None: not known
    python: str | None = None  # interpreter of its process; None: this one

    def process(self) -> Any:
        return worker(self.name, self.python)


def target(name: str, path: str | Path) -> Target:
    """A model to be timed; InputError when it is no ONNX folder."""
    if kind_of(path) != "onnx":
        if not Path(path).exists():
            raise InputError(f"{path} does not exist: give a folder that `dmpt-export onnx` made")
        raise InputError(
            f"{path} is no ONNX folder, so it has no speed yet: export it first: dmpt-export onnx {path} OUT"
        )
    touched: int = read_manifest(Path(path)).raw["bytes_touched_per_token"]
    return Target(name, str(path), size_bytes=onnx_size(path), touched_bytes=touched)


def measure(
    targets: Sequence[Target],
    prompt: int | Sequence[int] = 128,
    gen: int | Sequence[int] = 64,
    repetitions: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    text: Sequence[int] | None = None,
    loads: int = 1,
    fixed_prompt: bool = False,
    fixed_gen: bool = False,
    depth: Sequence[int] | None = None,
    roof: bool = False,
) -> list[Speed]:
    """Time all targets in one interleaved schedule.

    prompt, gen: tokens fed at once, tokens decoded one by one; several make several tests. depth: tokens before the
    decoded ones; default: the first prompt. Prompt and gen shrink to the smallest context among the targets; what is
    `fixed`, and depth, does not, and must fit it (InputError).
    threads: None lets each adapter choose (the runtime takes what this process may use).
    text: token ids to take the prompts from; default, and where it is too short: random ids.
    loads: fresh processes whose load time is taken, the one that is measured included.
    roof: also measure after each round how fast memory is read, on one thread and on as many as the first target uses.
    Raises WorkerFailed with the exit code of the failing process.
    """
    load_s = [[start_and_stop(t, threads, device) for _ in range(loads - 1)] for t in targets]
    with ExitStack() as stack:
        workers = [stack.enter_context(t.process()) for t in targets]
        facts = []
        for w, t, seconds in zip(workers, targets, load_s, strict=True):
            facts.append(w.ask(do="load", adapter=t.adapter, path=t.path, threads=threads, device=device))
            seconds.append(facts[-1]["load_s"])
        context = min(fact["context"] for fact in facts)
        tests = cases(_several(prompt), _several(gen), depth, context, fixed_prompt, fixed_gen)
        longest = max(max(case.tokens, case.depth) for case in tests)
        ids = prompt_ids(longest, min(fact["vocab_size"] for fact in facts), text)
        memory = Roof(stack.enter_context(worker("memory")), sorted({1, facts[0]["threads"]})) if roof else None
        rounds = play(workers, tests, ids, repetitions, memory)
        ends = [w.ask(do="finish") for w in workers]
    return [
        Speed.of(t.name, turns, seconds, {**fact, **end}, t.size_bytes, t.touched_bytes, memory.seen if memory else {})
        for t, fact, turns, seconds, end in zip(targets, facts, rounds, load_s, ends, strict=True)
    ]


def _several(counts: int | Sequence[int]) -> Sequence[int]:
    return [counts] if isinstance(counts, int) else counts


class Roof:
    """Reads of memory between the rounds, in a process of their own."""

    def __init__(self, memory: Worker, threads: Sequence[int]) -> None:
        self.memory, self.size = memory, 0
        self.seen: dict[int, list[float]] = {t: [] for t in threads}  # threads -> bytes/s of each round

    def read(self) -> None:
        """Where memory is too short nothing is seen from then on, and a line on standard error says so."""
        try:
            for threads, rates in self.seen.items():
                self.size = self.size or buffer_bytes()
                rates.append(self.memory.ask(do="read", size=self.size, threads=threads)["bytes_per_s"])
        except (MemoryError, WorkerFailed) as error:
            tqdm.write(f"the roof is not measured: {error}", file=sys.stderr)
            self.seen = {}


def play(
    workers: Sequence[Worker], tests: Sequence[Case], ids: list[int], repetitions: int, memory: Roof | None = None
) -> list[dict[Case, list[dict[str, Any]]]]:
    """The interleaved schedule: for each worker the replies of its turns by test, the warm-up left out."""
    turns: list[dict[Case, list[dict[str, Any]]]] = [{case: [] for case in tests} for _ in workers]
    with tqdm(total=(1 + repetitions) * len(workers) * len(tests), desc="bench", unit="turn", disable=None) as bar:
        for number in range(1 + repetitions):
            if memory is not None and number > 1:
                turn(workers[-1], tests[-1], ids)  # not timed: the caches hold what they do before any other turn
            for case in tests:
                for mine, w in zip(turns, workers, strict=True):
                    bar.set_postfix_str(f"{w.name} {case.name}", refresh=True)
                    time.sleep(SETTLE_S if len(workers) > 1 else 0)
                    mine[case].append(turn(w, case, ids))
                    bar.update()
            if memory is not None and number:
                memory.read()
    return [{case: replies[1:] for case, replies in mine.items()} for mine in turns]


def turn(w: Worker, case: Case, ids: list[int]) -> dict[str, Any]:
    """One test once: {"seconds", and of tg "native_s" (None: not known) and "switches" of leaf}."""
    if case.kind == "pp":
        return {"seconds": w.ask(do="prefill", ids=ids[: case.tokens])["seconds"]}
    reply = w.ask(do="decode", ids=ids[: case.depth], n=case.tokens)
    switches = int(np.count_nonzero(np.diff(reply["routes"])))
    return {"seconds": reply["seconds"], "native_s": reply["native_s"], "switches": switches}


def prompt_ids(n: int, vocab_size: int, text: Sequence[int] | None) -> list[int]:
    if text is not None and len(text) >= n:
        return [int(i) for i in text[:n]]
    return np.random.default_rng(SEED).integers(0, vocab_size, n).tolist()


def start_and_stop(t: Target, threads: int | None, device: str) -> float:
    """Load time in a fresh process that does nothing else."""
    with t.process() as w:
        seconds: float = w.ask(do="load", adapter=t.adapter, path=t.path, threads=threads, device=device)["load_s"]
        return seconds
