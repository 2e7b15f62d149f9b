"""Fake models: a scorer that follows a rule, and an adapter with given timings."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.peers.adapters import FACTS, nothing


class FakeScorer:
    """Scores by `rule(ids) -> log-probs [S, V]`; stores its requests."""

    def __init__(
        self,
        rule: Callable[[NDArray[Any]], NDArray[np.float32]],
        vocab_size: int,
        context: int = 64,
        tokenizer: Tokenizer | None = None,
        routes: Callable[[NDArray[Any]], NDArray[np.int64]] | None = None,
    ) -> None:
        self.rule, self.routes = rule, routes
        self.name, self.folder, self.mode = "fake", Path("fake"), "gate_hard"
        self.context, self.vocab_size = context, vocab_size
        self.leaves, self.head_allocation = ["left", "right"], {"left": [0], "right": [1]}
        self.tokenizer, self.end_of_text = tokenizer, 0
        self.asked: list[tuple[list[int], int]] = []

    def score(self, ids: NDArray[Any], last: int) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
        assert 1 <= last <= len(ids) <= self.context
        self.asked.append((ids.tolist(), last))
        return self.rule(ids)[-last:], None if self.routes is None else self.routes(ids)[-last:]


def uniform(vocab_size: int) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    return lambda ids: np.full((len(ids), vocab_size), -np.log(vocab_size), np.float32)


class FakeError(ValueError):
    exit_code = 3


class FakeAdapter:
    """Behaves as its path says, a JSON object: {"prefill": s, "decode": s, "log": file, ...}."""

    def __init__(self, path: str, threads: int | None) -> None:
        facts = Path(path, FACTS) if path[0] != "{" else None  # the result of convert()
        self.told: dict[str, Any] = json.loads(facts.read_text() if facts else path)
        self.context, self.vocab_size = self.told.get("context", 1024), self.told.get("vocab", 50)
        self.threads = threads or 2
        self.before_step = nothing
        self.ballast = bytearray(self.told.get("bytes", 0))
        self.ballast[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(
            range(0, len(self.ballast), os.sysconf("SC_PAGE_SIZE"))
        )
        self.round = 0
        if "fail" in self.told:
            raise {"user": FakeError, "bug": RuntimeError}[self.told["fail"]]("cannot be opened")
        if self.told.get("silent"):
            self.score = None  # type: ignore[assignment]  # an adapter without it
        if self.told.get("spin"):
            threading.Thread(target=self.spin, daemon=True).start()
        os.write(1, b"a library prints to standard output\n")

    def spin(self) -> None:
        while True:
            pass

    def note(self, what: str, detail: Any) -> None:
        if log := self.told.get("log"):
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps([self.told["name"], what, detail]) + "\n")

    def prefill(self, ids: list[int]) -> float:
        self.note("prefill", ids)
        time.sleep(self.told.get("sleep", 0))
        return float(self.told["prefill"])

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        self.note("decode", n)
        for _ in range(n):
            self.before_step()
        if self.told.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = self.told["decode"]
        self.native_s = self.told.get("native")
        self.round += 1
        taken = seconds[self.round - 1] if isinstance(seconds, list) else seconds
        return float(taken), [1] * n, [i % 2 for i in range(n)]

    def score(self, ids: list[int], last: int) -> NDArray[np.float64]:
        """Sure that every token is followed by itself."""
        return np.log(np.eye(self.vocab_size)[ids[-last:]] * 0.9 + 0.1 / self.vocab_size)


def load(path: str, threads: int | None, device: str) -> FakeAdapter:
    return FakeAdapter(path, threads)


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Records the conversion; some schemes fail, here or later."""
    Path(out).mkdir(parents=True)
    if scheme == "broken":
        raise FakeError("cannot be converted")
    if scheme == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if scheme == "file":
        Path(out, "weights").write_text("good")
    behaviour = {"prefill": 0.5, "decode": 0.25, "vocab": 300, "context": 64}
    faults = {"dies": {"dies": True}, "unloadable": {"fail": "bug"}, "silent": {"silent": True}}
    more = {**behaviour, **faults.get(scheme, {})}
    return {"size_bytes": 11, "touched_bytes": 7, "source": source, "scheme": scheme, **more}
