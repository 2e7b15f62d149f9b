"""How fast models prefill and decode, timed fairly.

Every model runs in a fresh process of its own (benchmarks.worker), and all take turns in one interleaved
schedule, A B C A B C ...: whatever else the machine does hits all of them alike. Same prompt, same number
of threads, one warm-up round that does not count, medians with the least and the greatest value.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.scorer import kind_of, onnx_size
from training.errors import InputError

DMPT_ONNX = "benchmarks.adapters.dmpt_onnx"
SEED = 0  # of the random prompt used when no text is given
SETTLE_S = 0.03  # between turns: thread pools spin for some milliseconds after their last run


class WorkerFailed(RuntimeError):
    """A model could not be measured; `exit_code` is that of the error in its process."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Target:
    """A model to be timed."""

    name: str
    path: str
    adapter: str = DMPT_ONNX  # module with load(path, threads, device); see benchmarks.adapters
    size_bytes: int = 0


@dataclass(frozen=True)
class Speed:
    """Timings of one model; the samples are in the order of the rounds."""

    name: str
    decode: list[float]  # tokens/s of each round
    prefill: list[float]  # tokens/s of each round
    load_s: list[float]  # of each fresh process
    peak_rss_bytes: int  # of the process that loaded, prefilled and decoded
    size_bytes: int
    threads: int
    prompt_tokens: int
    generated_tokens: int
    switches: int  # of leaf, between the generated tokens of one round
    idle_cpu_s: float = field(default=0.0)  # CPU time used while other models had their turn

    def to_json(self) -> dict[str, Any]:
        return {
            **spread("decode_tokens_per_s", self.decode),
            **spread("prefill_tokens_per_s", self.prefill),
            **spread("load_s", self.load_s),
            # one process is measured: the ends are there so that every figure has the same three keys
            **dict.fromkeys(("peak_rss_bytes", "peak_rss_bytes_min", "peak_rss_bytes_max"), self.peak_rss_bytes),
            "size_bytes": self.size_bytes,
            "threads": self.threads,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "repetitions": len(self.decode),
            "switches": self.switches,
            "idle_cpu_s": self.idle_cpu_s,
        }


def spread(name: str, samples: Sequence[float]) -> dict[str, float]:
    """Median under `name`, extremes under `name`_min and `name`_max."""
    return {name: statistics.median(samples), f"{name}_min": min(samples), f"{name}_max": max(samples)}


def target(name: str, path: str | Path) -> Target:
    """A model to be timed; InputError when it is no ONNX folder."""
    if kind_of(path) != "onnx":
        if not Path(path).exists():
            raise InputError(f"{path} does not exist: give a folder that `dmpt-export onnx` made")
        raise InputError(
            f"{path} is no ONNX folder, so it has no speed yet: export it first: dmpt-export onnx {path} OUT"
        )
    return Target(name, str(path), size_bytes=onnx_size(path))


def measure(
    targets: Sequence[Target],
    prompt: int = 128,
    gen: int = 64,
    repetitions: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    text: Sequence[int] | None = None,
    loads: int = 1,
    fixed_prompt: bool = False,
    fixed_gen: bool = False,
) -> list[Speed]:
    """Time all targets in one interleaved schedule.

    prompt, gen: tokens fed at once, tokens decoded one by one after them. Together they shrink to the smallest
    context among the targets; one that is `fixed` does not, and must fit it (InputError).
    threads: None lets each adapter choose (the runtime takes what this process may use).
    text: token ids to take the prompt from (the first `prompt`); default: random ids.
    loads: fresh processes whose load time is taken, the one that is measured included.
    Raises WorkerFailed with the exit code of the failing process.
    """
    load_s = [[start_and_stop(t, threads, device) for _ in range(loads - 1)] for t in targets]
    with ExitStack() as stack:
        workers = [stack.enter_context(worker(t.name)) for t in targets]
        facts = []
        for w, t, seconds in zip(workers, targets, load_s, strict=True):
            facts.append(w.ask(do="load", adapter=t.adapter, path=t.path, threads=threads, device=device))
            seconds.append(facts[-1]["load_s"])
        context = min(fact["context"] for fact in facts)
        prompt, gen = fit(prompt, gen, context, fixed_prompt, fixed_gen)
        ids = prompt_ids(prompt, min(fact["vocab_size"] for fact in facts), text)
        rounds = play(workers, ids, gen, repetitions)
        ends = [w.ask(do="finish") for w in workers]
    return [
        result(t, fact, turns, seconds, end, prompt, gen)
        for t, fact, turns, seconds, end in zip(targets, facts, rounds, load_s, ends, strict=True)
    ]


def result(
    t: Target,
    fact: dict[str, Any],
    turns: list[dict[str, Any]],
    load_s: list[float],
    end: dict[str, Any],
    prompt: int,
    gen: int,
) -> Speed:
    """One target's replies as a Speed."""
    return Speed(
        name=t.name,
        decode=[gen / turn["decode_s"] for turn in turns],
        prefill=[prompt / turn["prefill_s"] for turn in turns],
        load_s=load_s,
        peak_rss_bytes=end["peak_rss_bytes"],
        size_bytes=t.size_bytes,
        threads=fact["threads"],
        prompt_tokens=prompt,
        generated_tokens=gen,
        switches=turns[-1]["switches"],
        idle_cpu_s=end["idle_cpu_s"],
    )


def play(workers: Sequence[Worker], ids: list[int], gen: int, repetitions: int) -> list[list[dict[str, Any]]]:
    """The interleaved schedule: for each worker its turns, the warm-up left out."""
    turns: list[list[dict[str, Any]]] = [[] for _ in workers]
    with tqdm(total=(1 + repetitions) * len(workers), desc="bench", unit="turn", disable=None) as bar:
        for _ in range(1 + repetitions):
            for mine, w in zip(turns, workers, strict=True):
                bar.set_postfix_str(w.name, refresh=True)
                time.sleep(SETTLE_S if len(workers) > 1 else 0)
                prefill = w.ask(do="prefill", ids=ids)
                decode = w.ask(do="decode", ids=ids, n=gen)
                switches = int(np.count_nonzero(np.diff(decode["routes"])))
                mine.append({"prefill_s": prefill["seconds"], "decode_s": decode["seconds"], "switches": switches})
                bar.update()
    return [mine[1:] for mine in turns]


def fit(prompt: int, gen: int, context: int, fixed_prompt: bool = False, fixed_gen: bool = False) -> tuple[int, int]:
    """Prompt and generated tokens that fit the context together; fixed ones stay as they are or InputError is raised.

    >>> fit(128, 64, 1024), fit(128, 64, 96), fit(128, 8, 96), fit(90, 64, 96, fixed_prompt=True)
    ((128, 64), (64, 32), (88, 8), (90, 6))
    """
    if prompt + gen > context and not fixed_gen:
        gen = min(gen, max(1, context - prompt if fixed_prompt else context // 3))
    if prompt + gen > context and not fixed_prompt:
        prompt = max(1, context - gen)
    if prompt + gen > context:
        raise InputError(f"--prompt {prompt} and --gen {gen} do not fit a context of {context} tokens together")
    return prompt, gen


def prompt_ids(n: int, vocab_size: int, text: Sequence[int] | None) -> list[int]:
    if text is not None and len(text) >= n:
        return [int(i) for i in text[:n]]
    return np.random.default_rng(SEED).integers(0, vocab_size, n).tolist()


# --- worker processes -------------------------------------------------------------------------------


class Worker:
    """The parent's end of one `benchmarks.worker` process."""

    def __init__(self, name: str) -> None:
        self.name = name
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its reply; WorkerFailed when it says error, or died."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self.death()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(f"{self.name}: {reply['error']}", reply["exit_code"])
        return reply

    def death(self) -> WorkerFailed:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return WorkerFailed(f"the process that timed {self.name} was killed: probably out of memory", 5)
        return WorkerFailed(f"the process that timed {self.name} ended with code {code}: see what it said above", 1)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            self.process.stdout.close()


@contextmanager
def worker(name: str) -> Iterator[Worker]:
    w = Worker(name)
    try:
        yield w
    except BaseException:  # also Ctrl-C: do not wait for a long request to end
        w.process.kill()
        raise
    finally:
        w.close()


def start_and_stop(t: Target, threads: int | None, device: str) -> float:
    """Load time in a fresh process that does nothing else."""
    with worker(t.name) as w:
        seconds: float = w.ask(do="load", adapter=t.adapter, path=t.path, threads=threads, device=device)["load_s"]
        return seconds
