"""`dmpt-export serve` under load: are texts right, does memory stay, how fast is it beside llama.cpp's server?

    python -m benchmarks.evidence.serving DEVICE --text FILE --work WORK --phase texts load speed
    python -m benchmarks.evidence.serving DEVICE ... --phase speed --llama-server PROGRAM --checkpoint GPT2

texts: 32 clients at once, each text compared with what runtime.generate gives for its prompt.
load: --minutes of good clients, whose texts are compared, too, beside bad ones of every kind; memory and open files.
replicas: two servers behind nginx (docs/examples/nginx.conf). While clients ask, one at a time is ended by SIGTERM and
replaced, twice.
stall: how long a text waits for its next token while a prompt of 1000 tokens is read.
speed: tokens per second by the number of clients at once. llama-server (Q8_0, made of the same weights, needs `pip
install gguf`, and llama-quantize beside it) runs in turn with ours.

DEVICE must have float weights for the first two: int8 and int4 kernels round the rows of a batch differently from one
row, so that nearly equally likely tokens may change places.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import runtime
from benchmarks.evidence.driver import say
from benchmarks.evidence.serving_clients import BAD, PLACE, Answer, Tally, bad, complete, good

PORT, LLAMA_PORT = 8095, 8096
CLIENTS = (1, 2, 4, 8, 16)
PROMPT, NEW = 32, 64  # tokens, where speed is measured
PHASES = ("texts", "load", "speed", "replicas", "stall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="prompts are taken from its lines")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES[:3])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--good", type=int, default=12, help="good clients at once, under load")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="the GPT-2 folder of DEVICE, for llama.cpp")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    phases = {"texts": texts, "load": load, "speed": speed, "replicas": replicas, "stall": stall}
    for phase in options.phase:
        result = phases[phase](options)
        (options.work / f"{phase}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(json.dumps({phase: result}, indent=1) + "\n")


@contextmanager
def serving(options: argparse.Namespace, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Our server, in a process of its own; it must end by itself after SIGTERM."""
    with started(options, log, PORT) as process:
        asyncio.run(ready(PORT))
        yield process


@contextmanager
def started(options: argparse.Namespace, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    words = ["serve", str(options.device), "--port", str(port), "--threads", str(options.threads), "--no-check"]
    with open(log, "ab") as out, subprocess.Popen([sys.executable, "-m", "dmpt_export", *words], stderr=out) as process:
        try:
            yield process
        finally:
            process.terminate()
            if code := process.wait(60):
                raise SystemExit(f"the server ended with {code}: see {log}")


async def ready(port: int) -> None:
    for _ in range(600):
        try:
            reader, writer = await asyncio.open_connection(PLACE, port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read(12)
            writer.close()
            if answer.endswith(b"200"):
                return
        except OSError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the server does not start: see its log in --work")


def prompts(options: argparse.Namespace, count: int) -> list[str]:
    """Beginnings of lines, of 3 to 100 words."""
    lines = [line.split() for line in options.text.read_text(encoding="utf-8").split("\n")]
    long = [line for line in lines if len(line) > 100][:count]
    return [" ".join(line[: 3 + 97 * n // max(1, count - 1)]) for n, line in enumerate(long)]


def expected(options: argparse.Namespace, count: int) -> list[tuple[str, int, str]]:
    """(prompt, new tokens, greedy text of runtime.generate)."""
    with runtime.load(options.device, threads=options.threads, verify=False) as model:
        cases = [(prompt, 10 + 7 * n % 60) for n, prompt in enumerate(prompts(options, count))]
        return [(prompt, most, str(model.generate(prompt, most))) for prompt, most in cases]


def texts(options: argparse.Namespace) -> dict[str, Any]:
    cases = expected(options, 32)

    async def ask() -> list[Answer]:
        bodies = [{"prompt": prompt, "max_tokens": most, "temperature": 0} for prompt, most, _ in cases]
        return list(await asyncio.gather(*(complete(PORT, body) for body in bodies)))

    with serving(options, options.work / "texts.log"):
        answers = asyncio.run(ask())
    equal = sum(answer.text == want for answer, (_, _, want) in zip(answers, cases, strict=True))
    return {"clients": len(cases), "equal": equal}


# --- load ----------------------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> dict[str, Any]:
    import psutil

    cases, tally = expected(options, 24), Tally()
    met: dict[str, dict[str, int]] = {kind: {} for kind in BAD}
    samples: list[tuple[float, float, int, int]] = []  # seconds, resident MB, open files, threads

    async def watch(process: psutil.Process, began: float, end: float) -> None:
        while time.monotonic() < end:
            with process.oneshot():
                samples.append((round(time.monotonic() - began, 1), process.memory_info().rss / 1e6, process.num_fds(),
                                process.num_threads()))  # fmt: skip
            await asyncio.sleep(1)

    async def everyone(process: psutil.Process) -> None:
        began = time.monotonic()
        end = began + 60 * options.minutes
        clients = [good(PORT, cases, tally, end, seed) for seed in range(options.good)]
        await asyncio.gather(watch(process, began, end), *clients, *(bad(PORT, kind, met[kind], end) for kind in BAD))

    with serving(options, options.work / "load.log") as server:
        asyncio.run(everyone(psutil.Process(server.pid)))
        asyncio.run(asyncio.sleep(2))
        at_rest = psutil.Process(server.pid).memory_info().rss / 1e6, psutil.Process(server.pid).num_fds()
    log = (options.work / "load.log").read_text(encoding="utf-8")
    (options.work / "memory.json").write_text(json.dumps(samples), encoding="utf-8")
    return {
        "minutes": options.minutes, "right": tally.right, "wrong": tally.wrong, "refused_429": tally.refused,
        "tokens_s": tally.tokens / (60 * options.minutes), "seconds": spread(tally.seconds),
        "first_s": spread(tally.first_s), "bad": met, "tracebacks": log.count("Traceback"),
        "prompts_in_log": sum(prompt in log for prompt, _, _ in cases),
        "memory_mb_by_minute": by_minute(samples, 1), "files_by_minute": by_minute(samples, 2),
        "at_rest": {"mb": at_rest[0], "files": at_rest[1]},
    }  # fmt: skip


def by_minute(samples: list[tuple[float, float, int, int]], column: int) -> list[int]:
    """The largest value of each minute."""
    minutes = range(int(samples[-1][0] // 60) + 1)
    return [round(max(sample[column] for sample in samples if sample[0] // 60 == minute)) for minute in minutes]


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": median(values), "p95": float(np.percentile(values, 95)), "most": max(values)}


# --- replicas ------------------------------------------------------------------------------------------


def replicas(options: argparse.Namespace) -> dict[str, Any]:
    cases, tally, turns = expected(options, 24), Tally(), []
    conf = Path("docs/examples/nginx.conf").resolve()

    async def rollout(servers: dict[int, ExitStack]) -> None:
        """One replica at a time ends and is replaced; the next turn waits until the new one answers."""
        for number in range(2):
            for port, server in servers.items():
                await asyncio.sleep(5)
                say(f"{port}: SIGTERM")
                began = time.monotonic()
                await asyncio.to_thread(server.close)
                turns.append({"port": port, "run": number, "ended_in_s": round(time.monotonic() - began, 1)})
                server.enter_context(started(options, options.work / f"{port}.log", port))
                await ready(port)

    async def all_of_it(servers: dict[int, ExitStack]) -> None:
        await asyncio.gather(*map(ready, servers))
        until = time.monotonic() + 60
        asking = (good(8080, cases, tally, until, seed) for seed in range(options.good))
        await asyncio.gather(rollout(servers), *asking)

    nginx = subprocess.Popen(["nginx", "-p", str(options.work), "-c", str(conf), "-g", "daemon off;"])
    try:
        with ExitStack() as first, ExitStack() as second:
            servers = {8081: first, 8082: second}
            for port, server in servers.items():
                server.enter_context(started(options, options.work / f"{port}.log", port))
            asyncio.run(all_of_it(servers))
    finally:
        nginx.terminate()
        nginx.wait()
    return {"right": tally.right, "wrong": tally.wrong, "refused_429": tally.refused, "turns": turns}


# --- speed ---------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> dict[str, Any]:
    with serving(options, options.work / "speed.log"), peer(options) as with_peer:
        servers = {"dmpt-export": PORT, **({"llama-server": LLAMA_PORT} if with_peer else {})}
        found: dict[str, dict[int, list[dict[str, float]]]] = {name: {n: [] for n in CLIENTS} for name in servers}
        for number in range(options.rounds + 1):  # the first one warms up
            for clients in CLIENTS:
                for name, port in servers.items():
                    result = asyncio.run(throughput(port, clients, number))
                    if number:
                        found[name][clients].append(result)
                        say(f"{name} {clients}: {result}")
    return found


def stall(options: argparse.Namespace) -> dict[str, Any]:
    async def ask(prompt: int) -> tuple[float, float, float]:
        """Longest waits of a text, seconds: alone, beside a prompt of so many tokens; and that one's first token."""
        chosen = np.random.default_rng(1)
        ids, long = (chosen.integers(1000, 40000, size).tolist() for size in (PROMPT, prompt))
        body: dict[str, Any] = {"prompt": ids, "max_tokens": 150, "temperature": 0, "stream": True}
        alone = await complete(PORT, body)
        running = asyncio.create_task(complete(PORT, body))
        await asyncio.sleep(0.3)
        other = await complete(PORT, {"prompt": long, "max_tokens": 2, "stream": True})
        return alone.gap_s, (await running).gap_s, other.first_s

    with serving(options, options.work / "stall.log"):
        found = [asyncio.run(ask(1000)) for _ in range(5)]
    names = ("alone_s", "beside_s", "first_s")
    return {name: [round(times[place], 3) for times in found] for place, name in enumerate(names)}


async def throughput(port: int, clients: int, seed: int) -> dict[str, float]:
    """So many clients at once, each with several requests one after the other."""
    chosen = np.random.default_rng([seed, clients])
    each = max(1, 8 // clients)
    fields: dict[str, Any] = {"max_tokens": NEW, "temperature": 0, "stream": True}
    fields["stream_options"] = {"include_usage": True}
    if port == LLAMA_PORT:
        fields |= {"cache_prompt": False, "ignore_eos": True}

    async def client(asked: list[list[int]]) -> list[Answer]:
        return [await complete(port, {"prompt": ids, **fields}) for ids in asked]

    asked = chosen.integers(1000, 40000, (clients, each, PROMPT)).tolist()
    began = time.perf_counter()
    answers = [answer for got in await asyncio.gather(*map(client, asked)) for answer in got]
    seconds = time.perf_counter() - began
    if wrong := [answer for answer in answers if answer.status != 200 or answer.tokens != NEW]:
        raise SystemExit(f"{len(wrong)} answers are not complete: {wrong[0]}")
    first = median(answer.first_s for answer in answers)
    return {"tokens_s": round(clients * each * NEW / seconds, 1), "first_ms": round(1000 * first, 1)}


@contextmanager
def peer(options: argparse.Namespace) -> Iterator[bool]:
    """llama.cpp's server with as many slots, if it was given."""
    if options.llama_server is None:
        yield False
        return
    file = options.work / "q8_0.gguf"
    if not file.exists():
        from benchmarks.peers.adapters.llama_cpp_gguf import write_f32

        whole = options.work / "f32.gguf"
        write_f32(options.checkpoint, whole, options.device / "tokenizer.json")
        subprocess.run([options.llama_server.with_name("llama-quantize"), whole, file, "Q8_0", "1"], check=True)
    slots, threads = max(CLIENTS), str(options.threads)
    command = [str(options.llama_server), "-m", str(file), "--port", str(LLAMA_PORT), "-t", threads, "-tb", threads,
               "-np", str(slots), "-c", str(slots * 1024), "--no-ui", "-cram", "0", "--threads-http", "4"]  # fmt: skip
    with open(options.work / "llama.log", "wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            asyncio.run(ready(LLAMA_PORT))
            yield True
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
