"""Eviction before every step: other memory is read, and neither its time nor its memory counts."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest


def test_evicted_steps_read_other_memory_before_each_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One read before each step, whose memory does not count."""
    from benchmarks.peers.adapters import nothing
    from benchmarks.speed import bandwidth, worker

    class Slow:
        context, vocab_size, threads, native_s = 64, 10, 2, None
        before_step = staticmethod(nothing)

        def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
            for _ in range(n):
                self.before_step()
            return 1.0, [1] * n, [0] * n

    reads: list[tuple[int, int]] = []
    monkeypatch.setattr(
        bandwidth.Reader, "read", lambda self, threads=1: reads.append((self.buffer.nbytes, threads)) or 1.0
    )
    desk = worker.Desk()
    desk.model = Slow()
    before = desk.finish()
    assert desk.decode([1], 3, 1 << 26)["seconds"] == 1.0
    assert reads == [(1 << 26, 2)] * 3
    after = desk.finish()
    assert after["rss_bytes"] - before["rss_bytes"] < 1 << 24
    assert after["peak_rss_bytes"] - before["peak_rss_bytes"] < 1 << 24
    desk.decode([1], 3)
    assert len(reads) == 3


def test_what_happens_before_a_step_is_not_timed(tiny_dmpt: Path, tmp_path: Path) -> None:
    from benchmarks.peers.adapters.dmpt_onnx import DmptOnnx
    from benchmarks.peers.adapters.loop import Stepwise
    from dmpt_export.onnx.export import export_onnx

    class Peer(Stepwise):
        def reset(self) -> None: ...

        def feed(self, ids: list[int]) -> np.ndarray:
            return np.zeros(4, np.float32)

        def logits(self, ids: list[int], last: int) -> np.ndarray:
            return np.zeros((last, 4), np.float32)

    export_onnx(tiny_dmpt, tmp_path / "device", verify=False)
    for adapter in (Peer(), DmptOnnx(str(tmp_path / "device"), 1, "cpu")):
        pauses: list[int] = []

        def pause(own: list[int] = pauses) -> None:
            own.append(1)
            time.sleep(0.2)

        adapter.before_step = pause
        seconds, _, _ = adapter.decode([1, 2, 3], 4)
        assert len(pauses) == 4
        assert seconds < 0.6
