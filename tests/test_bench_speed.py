"""The interleaved schedule, its statistics, and what happens when a worker fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import Target, WorkerFailed, fit, measure, prompt_ids, target, worker
from training.errors import InputError

FAKE = "tests.bench_fakes"


def fake(name: str, **told: Any) -> Target:
    behaviour = {"name": name, "prefill": 0.5, "decode": 0.25} | told
    return Target(name, json.dumps(behaviour), FAKE, size_bytes=7)


def test_turns_are_interleaved_and_alike(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = measure([fake(name, log=str(log)) for name in "ABC"], prompt=10, gen=4, repetitions=2)
    turns = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(name, what) for name, what, _ in turns] == [
        (name, what) for _ in range(3) for name in "ABC" for what in ("prefill", "decode")
    ]
    prompts = {tuple(detail) for _, what, detail in turns if what == "prefill"}
    assert len(prompts) == 1 and len(*prompts) == 10
    assert {detail for _, what, detail in turns if what == "decode"} == {4}
    assert [r.name for r in results] == ["A", "B", "C"]


def test_medians_and_extremes_without_the_warm_up() -> None:
    # rounds: warm-up 100 s, then 1, 4, 2, 8, 16 s for 32 tokens
    (found,) = measure([fake("A", decode=[100, 1, 4, 2, 8, 16])], prompt=10, gen=32, threads=3)
    numbers = found.to_json()
    assert numbers["decode_tokens_per_s"] == 8
    assert numbers["decode_tokens_per_s_min"] == 2
    assert numbers["decode_tokens_per_s_max"] == 32
    assert numbers["prefill_tokens_per_s"] == numbers["prefill_tokens_per_s_min"] == 20
    assert numbers["threads"] == 3
    assert numbers["size_bytes"] == 7
    assert numbers["switches"] == 31
    assert 0 < numbers["load_s"] < 5
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


def test_a_slower_model_ranks_below() -> None:
    slow, fast = measure([fake("slow", decode=0.5), fake("fast", decode=0.4)], prompt=8, gen=8, repetitions=1)
    assert slow.to_json()["decode_tokens_per_s"] < fast.to_json()["decode_tokens_per_s"]


def test_loads_are_taken_in_fresh_processes() -> None:
    (found,) = measure([fake("A")], prompt=2, gen=2, repetitions=1, loads=3)
    assert len(found.load_s) == 3


def test_peak_memory_is_the_workers_own() -> None:
    ours = bytearray(400_000_000)  # a child must not report its parent's peak
    ours[::4096] = b"x" * len(range(0, len(ours), 4096))
    del ours
    small, large = measure([fake("small"), fake("large", bytes=200_000_000)], prompt=2, gen=2, repetitions=1)
    assert small.peak_rss_bytes < 150_000_000
    assert 180_000_000 < large.peak_rss_bytes - small.peak_rss_bytes < 240_000_000


def test_a_worker_that_spins_while_others_run_is_seen() -> None:
    quiet, busy = measure([fake("quiet", sleep=0.2), fake("busy", spin=True)], prompt=2, gen=2, repetitions=1)
    assert quiet.idle_cpu_s < 0.05
    assert busy.idle_cpu_s > 0.1


@pytest.mark.parametrize(
    ("told", "code", "said"),
    [
        ({"fail": "user"}, 3, "B: cannot be opened"),
        ({"fail": "bug"}, 1, "timed B ended with code 1"),
        ({"dies": True}, 5, "timed B was killed"),
    ],
)
def test_a_worker_that_fails_says_which_model_and_why(told: dict[str, Any], code: int, said: str) -> None:
    with pytest.raises(WorkerFailed, match=said) as failed:
        measure([fake("A"), fake("B", **told)], prompt=2, gen=2, repetitions=1)
    assert failed.value.exit_code == code


def test_workers_end_with_their_block() -> None:
    with worker("A") as w:
        assert w.process.poll() is None
    assert w.process.poll() == 0
    with pytest.raises(KeyboardInterrupt), worker("A") as w:
        raise KeyboardInterrupt
    assert w.process.poll() is not None


def test_prompt_and_generation_fit_the_smallest_context() -> None:
    results = measure([fake("A"), fake("B", context=30)], prompt=128, gen=64, repetitions=1)
    assert {(r.prompt_tokens, r.generated_tokens) for r in results} == {(20, 10)}
    assert fit(29, 1, 30) == (29, 1)
    for prompt, gen, fixed in ((30, 1, {"fixed_prompt": True}), (1, 30, {"fixed_gen": True}), (9, 9, {})):
        with pytest.raises(InputError, match="do not fit"):
            fit(prompt, gen, 1 if not fixed else 30, **fixed)


def test_prompts_are_the_text_or_always_the_same_random_ids() -> None:
    assert prompt_ids(3, 50, [4, 5, 6, 7]) == [4, 5, 6]
    ids = prompt_ids(200, 50, [4, 5])
    assert ids == prompt_ids(200, 50, None)
    assert len(ids) == 200 and set(ids) <= set(range(50)) and len(set(ids)) > 40


def test_only_onnx_folders_have_a_speed(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export it first: dmpt-export onnx"):
        target("gpt2", tiny_gpt2)
    with pytest.raises(InputError, match="does not exist"):
        target("gone", tmp_path / "gone")
