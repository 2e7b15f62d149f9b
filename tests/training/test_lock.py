"""One run, one writer: while a run works in a place, no other does, and the second one says who does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.comparison.comparison import workplace
from benchmarks.comparison.contestants import Settings
from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.perplexity import Resume, evaluate
from tests.helpers.checkpoints import one_line
from tests.helpers.cli import run
from tests.helpers.models import random_model
from tests.helpers.paths import REPOSITORY
from tests.helpers.training_runs import TOKENS, options
from training.checkpoints.lock import LOCK, check_free, lock_file, working_in
from training.errors import InputError
from training.loop.trainer import train

HOLDER = rf"`demo`, process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
BESIDE = {
    "init": ["init", "{gpt2}", "{out}"],
    "quantize": ["quantize", "{gpt2}", "{out}", "--scheme", "int8"],
    "onnx": ["onnx", "{gpt2}", "{out}"],
    "convert": ["convert", "{dmpt}", "{out}", "--heads", "projected", "--calib", "{text}"],
    "compare": ["compare", "{gpt2}", "--data", "{text}", "--out", "{out}"],
    "page": ["page", "{gpt2}", "{out}"],
}
INSIDE = {
    "train": ["train", "{gpt2}", "{out}", "--data", "{text}"],
    "train, a recipe": ["train", "{gpt2}", "{out}", "--data", "{text}", "--recipe", "deployed"],
    "resume": ["train", "--resume", "{out}"],
    "demo": ["demo", "--out", "{out}"],
}


@pytest.mark.parametrize("verb", [*BESIDE, *INSIDE])
def test_every_verb_refuses_a_place_in_use_and_says_whose(
    verb: str, tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("some words\n" * 300)
    places = {"gpt2": tiny_gpt2, "dmpt": tiny_dmpt, "text": tmp_path / "text", "out": tmp_path / "out"}
    with working_in(places["out"], "demo", beside=verb in BESIDE):
        before = sorted(tmp_path.rglob("*"))
        assert run(*(part.format(**places) for part in (BESIDE | INSIDE)[verb])) == 3
        assert re.search(HOLDER, capsys.readouterr().err)
        assert sorted(tmp_path.rglob("*")) == before
    assert sorted(tmp_path.iterdir()) == [places["text"]]


def test_only_one_of_many_gets_a_place(tmp_path: Path) -> None:
    """They start together and end at different times, so that the file is removed and made again all the time."""
    inside, most, refused = 0, 0, 0
    guard, start = threading.Lock(), threading.Barrier(8)

    def work() -> None:
        nonlocal inside, most, refused
        start.wait()
        for _ in range(20):
            try:
                with working_in(tmp_path / "out", "train"):
                    with guard:
                        inside, most = inside + 1, max(most, inside + 1)
                    with guard:
                        inside -= 1
            except InputError:
                refused += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused < 160


HOLDS = """
import sys
from training.checkpoints.lock import working_in
with working_in(sys.argv[1], "train"):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_killed_run_holds_nothing_and_its_file_goes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(out)],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "holds\n"
        with one_line(f"`train`, process {child.pid} on "):
            check_free(out)
        with pytest.raises(InputError, match="is in use by"), working_in(out, "train"):
            pass
        assert lock_file(out, beside=False).is_file()  # refusing it removes nothing
        child.send_signal(signal.SIGKILL)
    assert (out / LOCK).is_file()
    check_free(out)
    with working_in(out, "train"):
        (out / "result").touch()
    assert [path.name for path in out.iterdir()] == ["result"]


def test_folders_made_for_a_lock_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), working_in(tmp_path / "a" / "b", "train"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with one_line("cannot create the folder"), working_in(tmp_path / "out", "train"):
        pass


def test_two_trainings_of_the_library_do_not_mix(tmp_path: Path) -> None:
    with working_in(tmp_path / "run", "demo"), pytest.raises(InputError, match=HOLDER):
        train(random_model([], 1), TOKENS, options(), tmp_path / "run")
    train(random_model([], 1), TOKENS, options(max_steps=1), tmp_path / "run")
    assert not (tmp_path / "run" / LOCK).exists()


def test_scores_that_are_kept_have_one_writer(tiny_gpt2: Path, tmp_path: Path) -> None:
    with workplace(Settings(resume=tmp_path / "kept")), one_line("`compare`, process"):
        check_free(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()

    scorer = open_scorer(str(tiny_gpt2))
    first = evaluate(scorer, TOKENS[:200], resume=Resume(tmp_path, keep=True))
    (state,) = tmp_path.glob("eval-*.npz")
    with working_in(state, "demo", beside=True), pytest.raises(InputError, match=HOLDER):
        evaluate(scorer, TOKENS[:200], resume=Resume(tmp_path))
    assert evaluate(scorer, TOKENS[:200], resume=Resume(tmp_path)).perplexity == first.perplexity
    assert not list(tmp_path.iterdir())
