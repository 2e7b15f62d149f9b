"""The clients of benchmarks.evidence.serving see what is wrong."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import runtime
from benchmarks.evidence.serving import by_minute
from benchmarks.evidence.serving_clients import BAD, Tally, bad, complete, good, unchunked
from tests.helpers.serving import serving


def test_good_clients_count_right_wrong_and_refused_texts(dual_device: Path) -> None:
    with runtime.load(dual_device, threads=1) as model, serving(model) as served:
        case = ("The tide", 5, str(model.generate("The tide", 5)))
        right, wrong, refused = Tally(), Tally(), Tally()
        asyncio.run(good(served.port, [case], right, time.monotonic() + 0.3, 1))
        asyncio.run(good(served.port, [(*case[:2], case[2] + "!")], wrong, time.monotonic() + 0.3, 1))
        served.desk.bounds = type(served.desk.bounds)(parallel=1, queue=-1)
        asyncio.run(good(served.port, [case], refused, time.monotonic() + 0.3, 1))
        assert served.complete(prompt="a")[0] == 429
    assert right.right == len(right.seconds) > 0
    assert right.tokens == 5 * right.right
    assert (right.wrong, right.refused) == ([], 0)
    assert wrong.wrong
    assert not wrong.right
    assert refused.refused
    assert not refused.right


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind not in ("rushes", "connects only", "sends much")])
def test_bad_clients_are_met_and_good_ones_go_on(kind: str, dual_device: Path) -> None:
    counts: dict[str, int] = {}
    with runtime.load(dual_device, threads=1) as model, serving(model, client_timeout=0.5) as served:
        asyncio.run(bad(served.port, kind, counts, time.monotonic() + 1.2))
        answer = asyncio.run(complete(served.port, {"prompt": "The tide", "max_tokens": 5, "temperature": 0}))
        assert (answer.status, answer.text) == (200, model.generate("The tide", 5))
    assert sum(counts.values()) >= 1
    assert set(counts) <= {"400", "408", "413", "closed", "left", "still open at the end"}


def test_a_stream_without_its_last_chunk_is_broken() -> None:
    assert unchunked(b"5\r\nabcde\r\n2\r\nfg\r\n0\r\n\r\n") == b"abcdefg"
    with pytest.raises(ValueError):
        unchunked(b"5\r\nabcde\r\n")


def test_the_largest_value_of_each_minute() -> None:
    samples = [(0.0, 5.0, 1, 4), (59.9, 7.2, 3, 4), (61.0, 6.0, 2, 4)]
    assert (by_minute(samples, 1), by_minute(samples, 2)) == ([7, 6], [3, 2])
