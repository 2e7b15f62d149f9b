"""The run that --overwrite replaces is kept until the new one has saved, however and whenever the work ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.cli import run
from tests.helpers.kills import STEPS
from training.checkpoints.earlier import RUN, SAVED, recover_earlier, replacing
from training.errors import InputError
from training.loop import trainer

OLD = {"last/config.json": "old", "last/trainer_state/state.json": "old", "best/config.json": "old",
       "metrics.jsonl": "old", "config.json": "published", "notes.txt": "mine"}  # fmt: skip
KEPT = {"config.json", "notes.txt"}  # not the run's own


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


KILLED = (
    """
import os, shutil, signal, sys
from pathlib import Path
from training.checkpoints import earlier

out, last = Path(sys.argv[1]), int(sys.argv[2])
"""
    + STEPS
    + """for name in ("mkdir", "rename", "rmdir", "unlink"):
    setattr(os, name, step(getattr(os, name)))
with earlier.replacing(out, earlier.RUN, earlier.SAVED):
    step((out / "metrics.jsonl").write_text)("new")
    for name in sys.argv[3:]:
        os.makedirs(out / "saving" / "trainer_state")
        step((out / "saving" / "config.json").write_text)("new")
        (out / name).parent.mkdir(exist_ok=True)
        os.rename(out / "saving", out / name)
"""
)


@pytest.mark.parametrize("saved", [[], ["last"], ["best", "last"], ["phase-1/last"]])
def test_a_kill_leaves_the_old_run_or_the_new(saved: list[str], tmp_path: Path) -> None:
    seen = set()
    for last in range(120):
        out = tmp_path / str(last)
        write(out, OLD)
        command = [sys.executable, "-c", KILLED, str(out), str(last), *saved]
        done = subprocess.run(command, check=False, timeout=60)
        recover_earlier(out, RUN, SAVED)
        shutil.rmtree(out / "saving", ignore_errors=True)
        found = texts(out)
        assert {name: found.pop(name) for name in KEPT} == {name: OLD[name] for name in KEPT}
        runs = set(found.values())
        assert runs in ({"old"}, {"new"}), (last, found)
        assert runs == {"new"} or found.keys() == OLD.keys() - KEPT
        seen |= runs
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    else:
        pytest.fail("it never came to its end")
    assert seen == ({"old", "new"} if set(saved) & set(SAVED) else {"old"})


def test_two_at_once(tmp_path: Path) -> None:
    """While one process runs, another neither replaces its result nor cleans up after it."""
    out = tmp_path / "out"
    write(out, OLD)
    with replacing(out, RUN, SAVED):
        recover_earlier(out, RUN, SAVED)
        write(out, {"metrics.jsonl": "new"})
        with pytest.raises(InputError, match="another run is writing"), replacing(out, RUN, SAVED):
            pass
        assert texts(out)["metrics.jsonl"] == "new"
    assert texts(out) == OLD


def test_nothing_to_keep(tmp_path: Path) -> None:
    with replacing(tmp_path / "new", RUN, SAVED):
        assert not (tmp_path / "new").exists()
    write(tmp_path, {"notes.txt": "mine"})
    with replacing(tmp_path, RUN, SAVED):
        write(tmp_path, {"metrics.jsonl": "partial"})
    assert set(os.listdir(tmp_path)) == {"notes.txt", "metrics.jsonl"}


# --- through the verbs --------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path, sample_text: str) -> Path:
    (tmp_path / "text.txt").write_text(sample_text * 3, encoding="utf-8")
    return tmp_path / "text.txt"


def line(model: Path, out: Path, text: Path, *more: object) -> list[object]:
    short = ["--max-length", 16, "--batch-size", 1, "--cache-dir", text.parent / "cache", "--cpu"]
    return ["train", model, out, "--data", text, *short, *more]


ONE = ["--max-steps", 3]


@pytest.fixture
def recipe(tmp_path: Path) -> list[object]:
    (tmp_path / "recipe.json").write_text('{"phases": [{"max_steps": 1}, {"max_steps": 2}]}')
    return ["--recipe", tmp_path / "recipe.json"]


@pytest.mark.parametrize(
    ("old", "new", "fails_at"),
    [("one", "one", None), ("one", "one", 1), ("one", "one", 2), ("one", "phases", 1), ("phases", "one", 2),
     ("phases", "phases", 1), ("phases", "phases", 2)],
)  # fmt: skip
def test_train_overwrite(
    old: str, new: str, fails_at: int | None, tiny_gpt2: Path, text: Path, tmp_path: Path, recipe: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, kinds = tmp_path / "out", {"one": [*ONE, "--save-every", 1], "phases": recipe}
    assert run(*line(tiny_gpt2, out, text, *kinds[old], "--eval-data", text)) == 0
    before = contents(out)
    assert run(*line(tiny_gpt2, out, text, *kinds[new])) == 3
    assert contents(out) == before
    steps = iter(range(1, 99))
    monkeypatch.setattr(trainer, "set_lr", failing(trainer.set_lr, lambda: next(steps) == fails_at))
    code = run(*line(tiny_gpt2, out, text, *kinds[new], "--overwrite"))
    assert code == (0 if fails_at is None else 5)
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    if fails_at == 1:  # before anything was saved
        assert contents(out) == before
        return
    names = {name.partition("/")[0] for name in contents(out)}
    assert ("last" in names, "phase-1" in names, "best" in names) == (new == "one", new == "phases", False)
    monkeypatch.undo()
    assert run(*line(tiny_gpt2, out, text, *kinds[new], "--resume")) == 0
    assert run("eval", out, "--data", text, "--max-length", 16) == 0


def failing(real: Callable[..., None], now: Callable[[], bool]) -> Callable[..., None]:
    def call(*args: object) -> None:
        if now():
            raise MemoryError("planted")
        real(*args)

    return call
