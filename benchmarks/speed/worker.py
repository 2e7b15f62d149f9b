"""One model in one process that takes turns with others: `python -m benchmarks.speed.worker`.

Requests and replies are JSON objects, one per line, over standard input and output:

    {"do": "load", "adapter": MODULE, "path": P, "threads": T, "device": D}
                                                 -> {"load_s", "context", "vocab_size", "threads"}
    {"do": "prefill", "ids": [...]}              -> {"seconds"}
    {"do": "decode", "ids": [...], "n": N, "evict": BYTES}  -> {"seconds", "native_s" or null, "ids", "routes"}; evict:
                                                    bytes of other memory to read before every step, untimed, so that
                                                    the last-level cache holds no weights; 0: none
    {"do": "score", "ids": [...], "last": N, "out": FILE}   -> {}; log-probs, float32 [N, vocabulary], as .npy
    {"do": "read", "size": BYTES, "threads": T, "passes": P}  -> {"bytes_per_s"} of the fastest pass
    {"do": "convert", "adapter": MODULE, "source": P, "out": P, "scheme": S}  -> the facts of the adapter
    {"do": "versions", "packages": [...]}        -> {"python": V, PACKAGE: V or null ...}
    {"do": "profile", "path": P, "threads": T, "device": D, "ids": [...], "n": N}   -> {NODE TYPE: ms per token ...}
    {"do": "finish"}                             -> {"rss_bytes", "peak_rss_bytes", "idle_cpu_s"}

A failure that the user can fix is returned as {"error": message, "exit_code": n}. A separate process makes peak memory
and load time meaningful. During another worker's turn this one blocks on its input; `idle_cpu_s` proves that it did
not spin meanwhile. Besides its adapter's imports it only needs the standard library, runtime.ort, and numpy for scores,
so it also runs in another Python that has a peer, or should have.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter, process_time
from typing import Any, TextIO

from benchmarks.peers.adapters import nothing
from benchmarks.speed import bandwidth
from runtime.ort import no_telemetry


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    # Not getrusage first: on Linux its maximum survives exec, so a child would report its parent's peak.
    return status_bytes("VmHWM") or rusage_bytes()


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes; if the system does not report it, the peak."""
    return status_bytes("VmRSS") or rusage_bytes()


def status_bytes(field: str) -> int | None:
    """A size in /proc/self/status; None if missing."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None


def rusage_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Desk:
    """Answers requests about its loaded model."""

    def __init__(self) -> None:
        self.model: Any = None
        self.readers: dict[int, bandwidth.Reader] = {}  # by size, of the measurement of memory
        self.peak_before, self.evicted = 0, 0  # peak memory before the first eviction, and its buffer: bytes
        self.idle_cpu_s = 0.0

    def load(self, adapter: str, path: str, threads: int | None, device: str) -> dict[str, Any]:
        module = importlib.import_module(adapter)
        start = perf_counter()
        self.model = module.load(path, threads, device)
        seconds = perf_counter() - start
        facts = {name: int(getattr(self.model, name)) for name in ("context", "vocab_size", "threads")}
        return {"load_s": seconds, **facts}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        return {"seconds": self.model.prefill(ids)}

    def decode(self, ids: list[int], n: int, evict: int = 0) -> dict[str, Any]:
        if evict:
            self.peak_before, self.evicted = self.peak_before or peak_rss_bytes(), evict
            reader, threads = bandwidth.Reader(evict), max(1, int(self.model.threads))
            self.model.before_step = lambda: reader.read(threads)
        try:
            seconds, fed, routes = self.model.decode(ids, n)
        finally:
            self.model.before_step = nothing  # and the buffer is gone: other models need the memory
        return {"seconds": seconds, "native_s": getattr(self.model, "native_s", None), "ids": fed, "routes": routes}

    def score(self, ids: list[int], last: int, out: str) -> dict[str, Any]:
        import numpy as np

        if not callable(getattr(self.model, "score", None)):
            return {"error": "it does not return probabilities, so it has no perplexity", "exit_code": 3}
        np.save(out, np.asarray(self.model.score(ids, last), np.float32), allow_pickle=False)
        return {}

    def read(self, size: int, threads: int, passes: int = 1) -> dict[str, Any]:
        if size not in self.readers:
            self.readers[size] = bandwidth.Reader(size)
        return {"bytes_per_s": max(self.readers[size].bytes_per_s(threads) for _ in range(passes))}

    def convert(self, adapter: str, source: str, out: str, scheme: str) -> dict[str, Any]:
        facts: dict[str, Any] = importlib.import_module(adapter).convert(source, out, scheme)
        return facts

    def versions(self, packages: list[str]) -> dict[str, Any]:
        return {"python": platform.python_version(), **{package: installed(package) for package in packages}}

    def profile(self, path: str, threads: int | None, device: str, ids: list[int], n: int) -> dict[str, Any]:
        from benchmarks.speed.profiling import of_folder

        return of_folder(path, threads, device, ids, n)

    def finish(self) -> dict[str, Any]:
        peak = max(self.peak_before, peak_rss_bytes() - self.evicted)  # without the buffer of the measurement
        return {"rss_bytes": rss_bytes(), "peak_rss_bytes": peak, "idle_cpu_s": self.idle_cpu_s}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, request.pop("do"))(**request)
        except MemoryError:
            return {"error": "out of memory", "exit_code": 5}
        except Exception as error:  # noqa: BLE001  # a peer may raise anything; it must not end the others
            code = getattr(error, "exit_code", None)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return {"error": f"{error.strerror}: free some, or choose another place", "exit_code": 5}
            if not isinstance(code, int):  # a bug of ours or a peer's: its traceback goes to standard error
                traceback.print_exc()
                return {"error": f"{type(error).__name__}: {error}", "exit_code": 1}
            return {"error": str(error), "exit_code": code}


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer until the requests end (the parent closed the pipe, or died)."""
    desk = Desk()
    mark = process_time()
    for line in requests:
        desk.idle_cpu_s += process_time() - mark
        replies.write(json.dumps(desk.answer(json.loads(line))) + "\n")
        replies.flush()
        mark = process_time()


def main() -> None:
    no_telemetry()  # adapters import libraries that report
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not end up between the replies
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
