"""The interleaved schedule, its statistics, and failing workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.speed import processes
from benchmarks.speed.bandwidth import LEAST, MOST, Reader, available_bytes, buffer_bytes
from benchmarks.speed.cases import Case, Workload, cases, fit
from benchmarks.speed.processes import WorkerFailed, worker
from benchmarks.speed.results import Speed, Timings, ratio
from benchmarks.speed.timing import Schedule, Target, measure, prompt_ids, target
from dmpt_export.cli.bench import as_text
from training.errors import InputError

FAKE = "tests.helpers.bench_fakes"


def fake(name: str, **told: Any) -> Target:
    behaviour = {"name": name, "prefill": 0.5, "decode": 0.25} | told
    return Target(name, json.dumps(behaviour), FAKE, size_bytes=7)


def test_turns_are_interleaved_and_alike(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = measure([fake(name, log=str(log)) for name in "ABC"], Workload(10, 4), Schedule(2))
    turns = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(name, what) for name, what, _ in turns] == [
        (name, what) for _ in range(3) for what in ("prefill", "decode") for name in "ABC"
    ]
    prompts = {tuple(detail) for _, what, detail in turns if what == "prefill"}
    assert len(prompts) == 1
    assert len(*prompts) == 10
    assert {detail for _, what, detail in turns if what == "decode"} == {4}
    assert [r.name for r in results] == ["A", "B", "C"]


def test_medians_and_extremes_without_the_warm_up() -> None:
    # rounds: warm-up 100 s, then 1, 4, 2, 8, 16 s for 32 tokens
    (found,) = measure([fake("A", decode=[100, 1, 4, 2, 8, 16])], Workload(10, 32), threads=3)
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
    slow, fast = measure([fake("slow", decode=0.5), fake("fast", decode=0.4)], Workload(8, 8), Schedule(1))
    assert slow.to_json()["decode_tokens_per_s"] < fast.to_json()["decode_tokens_per_s"]


def test_loads_are_taken_in_fresh_processes() -> None:
    (found,) = measure([fake("A")], Workload(2, 2), Schedule(1, loads=3))
    assert len(found.load_s) == 3


def test_peak_memory_is_the_workers_own() -> None:
    ours = bytearray(400_000_000)  # a child must not report its parent's peak
    ours[::4096] = b"x" * len(range(0, len(ours), 4096))
    del ours
    small, large = measure([fake("small"), fake("large", bytes=200_000_000)], Workload(2, 2), Schedule(1))
    assert small.peak_rss_bytes < 150_000_000
    assert 180_000_000 < large.peak_rss_bytes - small.peak_rss_bytes < 240_000_000


def test_a_worker_that_spins_while_others_run_is_seen() -> None:
    quiet, busy = measure([fake("quiet", sleep=0.2), fake("busy", spin=True)], Workload(2, 2), Schedule(1))
    assert quiet.idle_cpu_s < 0.05
    assert busy.idle_cpu_s > 0.1


@pytest.mark.parametrize(
    ("told", "code", "said"),
    [
        ({"fail": "user"}, 3, "B: cannot be opened"),
        ({"fail": "bug"}, 1, "B: RuntimeError: cannot be opened"),
        ({"dies": True}, 5, "the process of B was killed"),
    ],
)
def test_a_worker_that_fails_says_which_model_and_why(told: dict[str, Any], code: int, said: str) -> None:
    with pytest.raises(WorkerFailed, match=said) as failed:
        measure([fake("A"), fake("B", **told)], Workload(2, 2), Schedule(1))
    assert failed.value.exit_code == code


def test_workers_end_with_their_block() -> None:
    with worker("A") as w:
        assert w.process.poll() is None
    assert w.process.poll() == 0
    with pytest.raises(KeyboardInterrupt), worker("A") as w:
        raise KeyboardInterrupt
    assert w.process.poll() is not None


def test_prompt_and_generation_fit_the_smallest_context() -> None:
    results = measure([fake("A"), fake("B", context=30)], Workload(128, 64), Schedule(1))
    assert {tuple(test.case for test in r.tests) for r in results} == {(Case("pp", 20), Case("tg", 10, 20))}
    assert fit(29, 1, 30) == (29, 1)
    for prompt, gen, fixed in ((30, 1, {"fixed_prompt": True}), (1, 30, {"fixed_gen": True}), (9, 9, {})):
        with pytest.raises(InputError, match="do not fit"):
            fit(prompt, gen, 1 if not fixed else 30, **fixed)


def test_prompts_are_the_text_or_always_the_same_random_ids() -> None:
    assert prompt_ids(3, 50, [4, 5, 6, 7]) == [4, 5, 6]
    ids = prompt_ids(200, 50, [4, 5])
    assert ids == prompt_ids(200, 50, None)
    assert len(ids) == 200
    assert set(ids) <= set(range(50))
    assert len(set(ids)) > 40


def test_only_onnx_folders_have_a_speed(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export it first: dmpt-export onnx"):
        target("gpt2", tiny_gpt2)
    with pytest.raises(InputError, match="does not exist"):
        target("gone", tmp_path / "gone")


# --- several tests, ratios, the roof ----------------------------------------------------------------


def test_every_prompt_and_every_count_after_every_depth() -> None:
    found = cases([512, 128], [64, 16], [128, 900], 1024)
    assert [c.name for c in found] == [
        "pp512", "pp128", "tg64 @ d128", "tg64 @ d900", "tg16 @ d128", "tg16 @ d900",
    ]  # fmt: skip
    assert [c.name for c in cases([512, 900], [128], None, 1024)] == ["pp512", "pp900", "tg128 @ d512"]
    assert [c.name for c in cases([512, 128], [128, 64], [900], 1024)][2:] == ["tg124 @ d900", "tg64 @ d900"]
    assert [c.name for c in cases([512, 40], [128], None, 64)] == ["pp43", "pp40", "tg21 @ d43"]


@pytest.mark.parametrize("depths", [[64], [63]])
def test_depths_must_fit(depths: list[int]) -> None:
    with pytest.raises(InputError, match=f"depth {depths[0]} and gen"):
        cases([8], [2], depths, 64, fixed_gen=True)
    assert cases([8], [2], [62], 64, fixed_gen=True)
    with pytest.raises(InputError, match="prompt 65"):
        cases([65], [2], [8], 64, fixed_prompt=True)


def test_each_depth_is_fed_before_its_tokens(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (found,) = measure([fake("A", log=str(log))], Workload([8, 4], [3, 2], [5, 6]), Schedule(1))
    lines = [json.loads(line)[1:] for line in log.read_text().splitlines()]
    sizes = [len(detail) if what == "prefill" else detail for what, detail in lines[len(lines) // 2 :]]
    assert sizes == [8, 4, 3, 3, 2, 2]
    assert [test.case.depth for test in found.tests] == [0, 0, 5, 6, 5, 6]
    assert found.to_json()["prompt_tokens"] == 8
    assert found.to_json()["generated_tokens"] == 3


def speed(decode: list[float], **fields: Any) -> Speed:
    case = Case("tg", 64, 128)
    return Speed("x", [Timings(Case("pp", 8), [1.0] * len(decode)), Timings(case, decode)], [1.0], 1, 1, 1, 2, **fields)


def test_ratios_are_taken_round_by_round() -> None:
    # ratios 2, 2 and 0.2 by round: the medians, 6 and 10, would say 0.6
    mine, its = speed([2, 20, 6]), speed([1, 10, 30])
    assert ratio(mine, its, Case("tg", 64, 128)) == 2
    assert mine.to_json(its)["tests"][1]["ratio"] == 2
    assert mine.to_json()["tests"][1]["ratio"] is None


def test_the_share_of_the_roof() -> None:
    # 100 bytes a token at 2, 4, 3 tokens/s, memory at 1000 bytes/s on the two threads of the model
    found = speed([2, 4, 3], touched_bytes=100, read_bytes_per_s={1: [7, 7, 7], 2: [1000, 2000, 1000]})
    assert found.roof_share(found.first("tg")) == pytest.approx(0.2)
    assert found.roof_share(found.first("pp")) is None
    assert speed([2, 4, 3]).roof_share(found.first("tg")) is None
    above = speed([2, 4, 3], touched_bytes=400, read_bytes_per_s={2: [1000, 1000, 1000]})
    assert "120.0 %" in as_text([above])
    assert "caches" in as_text([found, above])
    assert "caches" not in as_text([found])


def test_memory_is_read_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.timing.buffer_bytes", lambda: 1 << 24)
    (found,) = measure([fake("A")], Workload(2, 2), Schedule(3, roof=True), threads=2)
    assert {threads: len(rates) for threads, rates in found.read_bytes_per_s.items()} == {1: 3, 2: 3}
    assert min(map(min, found.read_bytes_per_s.values())) > 1e8


def test_no_timed_turn_follows_a_read_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def read(_: object) -> None:
        with log.open("a") as file:
            file.write('["memory", "read", 0]\n')

    monkeypatch.setattr("benchmarks.speed.timing.Roof.read", read)
    measure([fake(name, log=str(log)) for name in "AB"], Workload(2, 2), Schedule(2, roof=True))
    turns = [tuple(json.loads(line)[:2]) for line in log.read_text().splitlines()]
    one_round = [(name, what) for what in ("prefill", "decode") for name in "AB"]
    reading = ("memory", "read")
    # the turn between a read and the next round is not timed
    assert turns == [*one_round, *one_round, reading, ("B", "decode"), *one_round, reading]


@pytest.mark.parametrize("size", [None, 1 << 60])
def test_without_memory_for_the_roof_the_rest_goes_on(
    size: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_full() -> int:
        raise MemoryError("too full")

    monkeypatch.setattr("benchmarks.speed.timing.buffer_bytes", too_full if size is None else lambda: size)
    (found,) = measure([fake("A")], Workload(2, 2), Schedule(2, roof=True))
    assert found.read_bytes_per_s == {}
    assert found.to_json()["tests"][1]["roof_share"] is None
    assert capsys.readouterr().err.count("the roof is not measured: ") == 1
    assert "memory bandwidth" not in as_text([found])
    assert "2 threads" in as_text([found])


def test_the_buffer_outgrows_the_last_level_cache(tmp_path: Path) -> None:
    for name, text in {"index0": "48K", "index2": "2048K", "index3": "480M"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{text}\n")
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:       64000000 kB\nMemAvailable:   32000000 kB\n")
    assert buffer_bytes(tmp_path, memory) == 600 << 20
    assert buffer_bytes(tmp_path / "nothing", memory) == LEAST
    memory.write_text(f"MemAvailable:   {4 * 500 << 10} kB\n")
    assert buffer_bytes(tmp_path, memory) == 500 << 20
    memory.write_text(f"MemAvailable:   {4 * 400 << 10} kB\n")
    with pytest.raises(MemoryError, match="400 MiB, is no larger than the caches"):
        buffer_bytes(tmp_path, memory)
    assert available_bytes(tmp_path / "nothing") > 0
    memory.write_text("MemAvailable:   32000000 kB\n")
    (tmp_path / "index3" / "size").write_text("4G")
    assert buffer_bytes(tmp_path, memory) == MOST
    assert Reader(1 << 20).bytes_per_s(3) > 0


def test_python_s_share_is_what_the_adapter_did_not_spend_inside() -> None:
    (found,) = measure([fake("A", decode=0.5, native=0.4)], Workload(2, 2), Schedule(2))
    assert found.first("tg").python_share == pytest.approx(0.2)
    (silent,) = measure([fake("A")], Workload(2, 2), Schedule(1))
    assert silent.first("tg").python_share is None


def test_a_worker_scores_into_a_file_and_says_versions(tmp_path: Path) -> None:
    told = json.dumps({"name": "A", "prefill": 1, "decode": 1})
    with worker("A", sys.executable) as w:
        w.ask(do="load", adapter=FAKE, path=told, threads=1, device="cpu")
        w.ask(do="score", ids=[3, 4, 5], last=2, out=str(tmp_path / "scores.npy"))
        found = w.ask(do="versions", packages=["numpy", "no-such-package"])
    scores = np.load(tmp_path / "scores.npy", allow_pickle=False)
    assert scores.dtype == np.float32
    assert scores.argmax(1).tolist() == [4, 5]
    assert found["numpy"] == np.__version__
    assert found["no-such-package"] is None


def test_workers_find_the_package_whatever_the_folder() -> None:
    assert (processes.ROOT / "benchmarks" / "speed" / "worker.py").is_file()


def test_another_interpreter_sees_only_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed from a wheel, the packages lie beside all others of this Python."""
    site = tmp_path / "lib" / "site-packages"
    site.mkdir(parents=True)
    for name in processes.OURS:
        (site / name).symlink_to(processes.ROOT / name)
    (site / "numpy").mkdir()
    (site / "numpy" / "__init__.py").write_text("raise ImportError('of the other Python')")
    monkeypatch.setattr(processes, "ROOT", site)
    processes.our_packages.cache_clear()
    other = tmp_path / "python"  # another interpreter, as far as the path tells
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    with worker("A", str(other)) as w:
        assert w.ask(do="versions", packages=["numpy"])["numpy"] == np.__version__
    assert {path.name for path in processes.our_packages().iterdir()} == set(processes.OURS)
    processes.our_packages.cache_clear()


def test_standard_error_is_shown_only_by_a_worker_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noisy = tmp_path / "python"
    noisy.write_text(f'#!/bin/sh\necho "a warning of the peer" >&2\nexec {sys.executable} "$@"\n')
    noisy.chmod(0o755)
    with worker("A", str(noisy)) as w:
        w.ask(do="versions", packages=[])
    assert capfd.readouterr().err == ""
    with pytest.raises(WorkerFailed), worker("A", str(noisy)) as w:
        w.ask(do="load", adapter="no.such.module", path="", threads=1, device="cpu")
    assert "A wrote:\na warning of the peer" in capfd.readouterr().err


def test_an_interpreter_that_is_not_there_is_one_line() -> None:
    with pytest.raises(WorkerFailed, match="A: /no/python cannot be started") as failed, worker("A", "/no/python"):
        pass
    assert failed.value.exit_code == 3


def test_ctrl_c_reaches_the_parent_of_a_worker_alone() -> None:
    """A worker that is importing would answer it with a traceback."""
    code = (
        "import os, signal\n"
        "from benchmarks.speed.processes import Worker\n"
        "worker = Worker('model')\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.killpg(0, signal.SIGINT)\n"
        "worker.close()\n"
        "print(worker.process.returncode)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_evicted_cases_are_the_decoding_ones_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.timing.buffer_bytes", lambda: 1 << 20)
    (found,) = measure([fake("A")], Workload([8, 4], [3], [5, 6], evict=True), Schedule(1))
    names = [test.case.name for test in found.tests]
    assert names == ["pp8", "pp4", "tg3 @ d5", "tg3 @ d6", "tg3 @ d5, evicted", "tg3 @ d6, evicted"]
    assert found.first("tg").case.evict is False


def test_where_the_weights_came_from() -> None:
    evicted = Timings(Case("tg", 64, 128, evict=True), [1.0])
    for touched, cache, want in ((100, 200, "cached"), (300, 200, "partly cached"), (100, 0, None), (None, 200, None)):
        found = speed([1.0], touched_bytes=touched, cache_bytes=cache)
        assert found.weights(found.first("tg")) == want
        assert found.weights(found.first("pp")) is None
        assert found.weights(evicted) == "from memory"
    for cached, want in ((1.1e10, "partly cached"), (3e10, "cached")):  # shared with other machines, or not
        rates = {"cached_bytes_per_s": {2: [cached]}, "read_bytes_per_s": {2: [1e10]}}
        found = speed([1.0], touched_bytes=100, cache_bytes=200, **rates)
        assert found.weights(found.first("tg")) == want
    found = speed([1.0], touched_bytes=100, cache_bytes=200, cached_bytes_per_s={1: [3e10]})
    assert "last-level cache of 0.00 MB 30.0 GB/s on 1" in as_text([found])
    assert "|  cached |" in as_text([found])


def test_eviction_without_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_full() -> int:
        raise MemoryError("too full")

    monkeypatch.setattr("benchmarks.speed.timing.buffer_bytes", too_full)
    with pytest.raises(InputError, match="evict has too little free memory: too full"):
        measure([fake("A")], Workload(2, 2, evict=True), Schedule(1))
