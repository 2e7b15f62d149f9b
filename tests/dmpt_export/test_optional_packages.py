"""Training with optional packages: bitsandbytes and TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmpt_export.cli.main import main
from tests.helpers.models import random_model
from training.errors import InputError
from training.loop.options import TrainOptions
from training.loop.trainer import Extras, train

HAVE_BNB, HAVE_BOARD = (importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "tensorboard"))
TOKENS = (np.arange(1500) * np.arange(1500) % 97).astype(np.int32)

NO_BAR = Extras(title=None)


def options(**changes: Any) -> TrainOptions:
    small = {"max_steps": 6, "max_length": 16, "batch_size": 2, "grad_accum_steps": 1, "log_every": 1, "cpu": True}
    rates = {"lr": 1e-3, "head_lr": 1e-3, "gate_lr": 1e-3, "warmup_steps": 0, "lr_schedule": "constant"}
    return TrainOptions(**(small | rates | {"freeze_head0_steps": 0} | changes))


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--optimizer", "adamw8bit"],
            "--optimizer adamw8bit needs bitsandbytes: pip install 'dmpt-export[bnb]'",
        ),
        (["--tensorboard"], "--tensorboard needs tensorboard: pip install tensorboard"),
    ],
)
def test_a_missing_package_is_one_line_before_anything_is_written(
    flags: list[str],
    message: str,
    tiny_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training.loop.options.find_spec", lambda name: None)
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    line = ["train", str(tiny_gpt2), str(tmp_path / "out"), "--data", str(tmp_path / "text.txt"), *flags]
    assert main(line) == 3
    assert capsys.readouterr().err == f"Error: {message}\n"
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="pip install"):
        options(optimizer="adamw8bit").check_installed()


# --- bitsandbytes -----------------------------------------------------------------------------------


@pytest.fixture
def eight_bit() -> Any:
    """Runs on the CPU as on a GPU. One thread: sums in one order."""
    if not HAVE_BNB:
        pytest.skip("bitsandbytes is not installed: pip install 'dmpt-export[bnb]'")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("eight_bit")
def test_adamw8bit_trains_nearly_as_adamw_with_moments_of_one_byte(tmp_path: Path) -> None:
    for kind in ("adamw", "adamw8bit"):
        train(random_model([2], 4), TOKENS, options(optimizer=kind), tmp_path / kind, extras=NO_BAR)
    full, small = losses(tmp_path / "adamw"), losses(tmp_path / "adamw8bit")
    assert full[0] == small[0]
    assert full != small
    assert small == pytest.approx(full, rel=1e-2)
    state = load_file(tmp_path / "adamw8bit" / "last" / "trainer_state" / "optimizer.safetensors")
    for moment in ("state1", "state2"):
        assert state[f"transformer.h.0.mlp.c_fc.weight/{moment}"].dtype == torch.uint8
        assert state[f"gates.root.2.bias/{moment}"].dtype == torch.float32


@pytest.mark.usefixtures("eight_bit")
def test_a_resumed_run_with_adamw8bit_is_the_same_run(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(random_model([2], 4), TOKENS, options(optimizer="adamw8bit"), whole, extras=NO_BAR)
    train(random_model([2], 4), TOKENS, options(optimizer="adamw8bit", max_steps=3), parts, extras=NO_BAR)
    train(random_model([2], 4), TOKENS, options(optimizer="adamw8bit"), parts, resume=True, extras=NO_BAR)
    assert losses(parts) == losses(whole)
    for name in ("model.safetensors", "trainer_state/optimizer.safetensors"):
        one, two = load_file(whole / "last" / name), load_file(parts / "last" / name)
        assert one.keys() == two.keys(), name
        assert all(torch.equal(one[key], two[key]) for key in one), name


# --- TensorBoard ------------------------------------------------------------------------------------


class FakeWriter:
    """Stores what torch.utils.tensorboard.SummaryWriter would write."""

    made: list[FakeWriter] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.values: dict[tuple[str, int], float] = {}
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert (name, step) not in self.values
        self.values[name, step] = value

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("training.loop.options.find_spec", lambda name: True)
    monkeypatch.setattr(FakeWriter, "made", [])
    return FakeWriter.made


def test_tensorboard_gets_every_number_of_the_metrics(writers: list[FakeWriter], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(random_model([2], 4), TOKENS, options(max_steps=2, tensorboard=True), out, TOKENS[:200], extras=NO_BAR)
    (writer,) = writers
    assert writer.folder == str(out / "tensorboard")
    assert writer.closed
    assert writer.purge_step is None
    expected: dict[tuple[str, int], float] = {}
    for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        step = record.pop("step")
        flat = {name: value for name, value in record.items() if not isinstance(value, dict)}
        flat |= {f"routes/{leaf}": share for leaf, share in record.get("routes", {}).items()}
        for leaf, usage in record.get("heads", {}).items():
            flat |= {f"heads/{leaf}/{i}": share for i, share in enumerate(usage)}
        expected |= {(name, step): value for name, value in flat.items()}
    assert writer.values == expected
    assert {("loss", 1), ("routes/right", 2), ("heads/left/1", 2), ("eval_perplexity", 2)} <= set(expected)


def test_a_resumed_run_hides_what_it_writes_again(writers: list[FakeWriter], tmp_path: Path) -> None:
    settings = {"tensorboard": True, "save_every": 2}
    train(random_model([], 1), TOKENS, options(max_steps=2, **settings), tmp_path / "run", extras=NO_BAR)
    train(random_model([], 1), TOKENS, options(max_steps=3, **settings), tmp_path / "run", resume=True, extras=NO_BAR)
    assert [writer.purge_step for writer in writers] == [None, 3]
    assert {step for _, step in writers[1].values} == {3}


@pytest.mark.skipif(not HAVE_BOARD, reason="tensorboard is not installed: pip install tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own imports
def test_tensorboard_can_read_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(random_model([2], 4), TOKENS, options(max_steps=2, tensorboard=True), tmp_path / "run", extras=NO_BAR)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in read] == [1, 2]
    for (_, value), loss in zip(read, losses(tmp_path / "run"), strict=True):
        assert math.isclose(value, loss, rel_tol=1e-6)  # float32 in the file
