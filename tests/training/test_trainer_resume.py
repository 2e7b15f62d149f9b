"""A stopped training run: after a resume it is the same run, or an error explains why not; and leftovers of a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import random_model
from tests.helpers.paths import REPOSITORY
from tests.helpers.training_runs import (
    LENGTH,
    TOKENS,
    changed,
    interrupted_at,
    losses_of,
    metrics,
    options,
    parameters,
    some_tokens,
)
from training.checkpoints.checkpoint import load_model
from training.errors import InputError
from training.loop.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("splits", "heads"), [([], 1), ([2], 4)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_run(tmp_path: Path, splits: list[int], heads: int) -> None:
    """With dropout, accumulation, a tether to a head that has moved, log lines across the stop, several passes."""
    settings = options(max_steps=9, log_every=2, freeze_head0_steps=3, tether_coef=0.5, head_lb_coef=0.1, eval_every=4)
    tokens, held_out = TOKENS[: 12 * LENGTH + 1], some_tokens(100, 1)
    whole = random_model(splits, heads)
    train(whole, tokens, settings, tmp_path / "whole", held_out)

    interrupted_at(random_model(splits, heads), tmp_path / "parts", 5, settings, tokens, eval_tokens=held_out)
    torch.manual_seed(12345)  # whatever the process did in between
    resumed = random_model(splits, heads, seed=99)
    train(resumed, tokens, settings, tmp_path / "parts", held_out, resume=True)

    def numbers(run: Path) -> list[dict[str, Any]]:
        volatile = ("seconds", "tokens_per_s")
        return [{k: v for k, v in record.items() if k not in volatile} for record in metrics(run)]

    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert not changed(resumed, parameters(whole))


def test_the_time_is_of_the_whole_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(random_model([], 1), TOKENS, options(max_steps=2), run)
    state = run / "last" / "trainer_state" / "state.json"
    saved = json.loads(state.read_text())
    assert 0 < saved["seconds"] < 60
    state.write_text(json.dumps(saved | {"seconds": 1000.0}))
    result = train(random_model([], 1), TOKENS, options(max_steps=4), run, resume=True)
    assert 1000 < result.seconds < 1060
    assert 1000 < metrics(run)[-1]["seconds"] < 1060
    assert json.loads(state.read_text())["seconds"] > 1000
    del saved["seconds"]  # a run that an earlier version saved
    state.write_text(json.dumps(saved))
    assert train(random_model([], 1), TOKENS, options(max_steps=5), run, resume=True).seconds < 60


def test_a_run_of_an_older_version_resumes_without_talk_of_newer_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, settings = tmp_path / "run", options(max_steps=2)
    train(random_model([], 1), TOKENS, settings, run)
    file = run / "last" / "trainer_state" / "state.json"
    state = json.loads(file.read_text())
    for name in ("select", "select_balance", "next_tokens_coef", "next_tokens_rise", "next_tokens_detached"):
        del state["options"][name]
    file.write_text(json.dumps(state))
    capsys.readouterr()
    train(random_model([], 1), TOKENS, replace(settings, max_steps=4), run, resume=True)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resuming with")]
    assert notes == ["resuming with --max-steps 4 (before: 2)"]


def test_resuming_drops_metrics_that_it_will_write_again(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", options(max_steps=4, save_every=2)
    train(random_model([], 1), TOKENS, settings, run)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": 5, "lo')  # a killed run went further than its checkpoint
    train(random_model([], 1), TOKENS, replace(settings, max_steps=6), run, resume=True)
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": some_tokens(1500, 7)}, "crc32 of the training data"),
        ({"options": options(seed=1)}, "seed of the training data"),
        ({"options": options(max_length=8)}, "length of the training data"),
        ({"model": random_model([], 1, n_layer=2)}, "holds a different model"),
    ],
)
def test_resuming_something_else_fails_loudly(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The original restarted silently."""
    train(random_model([], 1), TOKENS, options(max_steps=1), tmp_path / "run")
    arguments = {"model": random_model([], 1), "tokens": TOKENS, "options": options()} | change
    with pytest.raises(InputError, match=message):
        train(**arguments, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", ["none", "state.json", "optimizer.safetensors", "rng.safetensors", "cut"])
def test_resuming_from_a_damaged_run_fails_loudly(tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    train(random_model([], 1), TOKENS, options(max_steps=1), run)
    state = run / "last" / "trainer_state"
    if damage == "none":
        for path in state.iterdir():
            path.unlink()
        state.rmdir()
    elif damage == "cut":
        data = (state / "optimizer.safetensors").read_bytes()
        (state / "optimizer.safetensors").write_bytes(data[: len(data) // 2])
    else:
        (state / damage).unlink()
    with pytest.raises(InputError, match=r"cannot resume|is missing"):
        train(random_model([], 1), TOKENS, options(), run, resume=True)


def test_no_file_of_a_run_is_a_pickle(tmp_path: Path) -> None:
    train(random_model([2], 4), TOKENS, options(max_steps=1), tmp_path / "run")
    names = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert names <= {".json", ".jsonl", ".safetensors", ".md"}


def test_a_run_is_not_overwritten_unless_asked_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(random_model([], 1), TOKENS, options(max_steps=2), run)
    with pytest.raises(InputError, match="continue it with resume"):
        train(random_model([], 1), TOKENS, options(max_steps=1), run)
    train(random_model([], 1), TOKENS, options(max_steps=1), run, overwrite=True)
    assert len(losses_of(run)) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no training run"):
        train(random_model([], 1), TOKENS, options(), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_kill_leaves_the_last_complete_checkpoint(tmp_path: Path) -> None:
    """SIGKILL while a checkpoint is being written, and at other moments: the folder still loads and resumes."""
    script = tmp_path / "go.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        import torch, training.loop.state as state
        from tests.helpers.models import random_model
        from tests.helpers.training_runs import TOKENS, options
        from training.loop.trainer import Extras, train
        torch.set_num_threads(1)
        real, saves, moment = state.write_tensors, 0, int(sys.argv[2])
        def deadly(*args, **kwargs):
            global saves
            saves += 1
            if saves == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        state.write_tensors = deadly
        train(random_model([2], 4), TOKENS, options(save_every=1), sys.argv[1], extras=Extras(title=None))
        """)
    )
    moments = (4, 5)  # within the second checkpoint: before its optimizer state, before its random numbers
    runs = {moment: tmp_path / f"run-{moment}" for moment in moments}
    killed = [
        subprocess.Popen([sys.executable, str(script), str(run), str(moment)], stderr=subprocess.PIPE)
        for moment, run in runs.items()
    ]
    for process, run in zip(killed, runs.values(), strict=True):
        _, err = process.communicate(timeout=200)
        assert process.returncode == -signal.SIGKILL, err.decode()
        assert load_model(run / "last").config.splits == [2]
        result = train(random_model([2], 4), TOKENS, options(max_steps=3), run, resume=True)
        assert result.steps == 3
        assert len(losses_of(run)) == 3
        assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
