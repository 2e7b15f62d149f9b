"""Long work shows that it is alive, also where nobody watches a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.helpers.models import random_model
from tests.helpers.training_runs import TOKENS, options
from training import progress
from training.loop.trainer import train
from training.progress import Bar, tell


def test_short_work_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(total=3, desc="work", unit=" things") as bar:
        for _ in range(3):
            bar.update()
    assert capsys.readouterr().err == ""


def test_long_work_leaves_lines_with_what_how_far_and_how_fast(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with Bar(total=4, desc="work", unit=" things") as bar:
        for i in range(4):
            bar.update()
            bar.set_postfix_str(f"item {i}", refresh=True)
        tell("a note")
    log = capsys.readouterr().err
    lines = log.split("\n")
    assert "\r" not in log
    assert "a note" in lines
    assert any(line.startswith("work: 2 of 4 (50 %), ") for line in lines)
    assert all(" elapsed, " in line and " left" in line for line in lines if line.startswith("work"))


def test_a_training_run_reports_its_loss_in_a_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    train(random_model([], 1), TOKENS, options(max_steps=3), tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert lines
    assert "of 3 (" in lines[-1]
    assert "loss=" in lines[-1]
    assert "tok/s=" in lines[-1]


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Bar(total=2, desc="work", mininterval=0) as bar:
        bar.update()
        bar.refresh()
    assert "\r" in stream.getvalue()
    assert "work:  50%|" in stream.getvalue()
