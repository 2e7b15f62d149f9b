"""The training loop: learning, evaluation, logs, errors, and every option's effect."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models import random_model
from tests.helpers.training_runs import LENGTH, TOKENS, changed, losses_of, metrics, options, parameters, some_tokens
from training.checkpoints.checkpoint import load_model, read_config
from training.errors import InputError
from training.loop.evaluation import evaluate
from training.loop.options import read_freeze_schedule
from training.loop.trainer import Extras, TrainResult, train
from training.model.generation import DMPTForCausalLM
from training.model.nonfinite import NonFiniteError
from training.text.batches import TokenBatches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("splits", "heads"), [([], 1), ([], 4), ([2], 4), ([1, 2], 4)])
def test_every_kind_of_model_learns_and_ends_as_a_checkpoint(tmp_path: Path, splits: list[int], heads: int) -> None:
    model = random_model(splits, heads)
    result = train(
        model, TOKENS, options(max_steps=25, tether_coef=0.0, dropout=0.0), tmp_path / "run", some_tokens(300, 1)
    )
    losses = losses_of(tmp_path / "run")
    assert result.steps == 25
    assert len(losses) == 25
    assert losses[-1] < losses[0] - 0.3
    assert result.tokens == 25 * 2 * 2 * LENGTH
    for folder in (result.folder, tmp_path / "run" / "last", tmp_path / "run" / "best"):
        assert read_config(folder).splits == splits
    final = load_model(tmp_path / "run" / "last")
    for name, p in model.named_parameters():
        assert torch.equal(p, final.get_parameter(name)), name
    assert not model.training


@pytest.mark.parametrize("mode", ["gate_soft", "gate_hard", "max_prob", "left_only"])
def test_every_path_selection_trains(tmp_path: Path, mode: str) -> None:
    model = random_model([2], 4)
    before = parameters(model)
    train(model, TOKENS, options(max_steps=2, train_path_selection=mode), tmp_path / "run")
    moved = changed(model, before)
    assert any(name.startswith("paths.left") for name in moved)
    assert any(name.startswith("gates.root") for name in moved) == (mode != "left_only")
    assert any(name.startswith("paths.right") for name in moved) == (mode != "left_only")


def test_the_end_of_max_steps_is_saved_and_evaluated(tmp_path: Path) -> None:
    """The original skipped the final save when max_steps was reached."""
    train(random_model([2], 4), TOKENS, options(max_steps=3, log_every=100), tmp_path / "run", some_tokens(200, 1))
    saved = json.loads((tmp_path / "run" / "last" / "trainer_state" / "state.json").read_text())
    assert saved["step"] == 3
    assert saved["finished"]
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [3, 3]
    assert "loss" in records[0]
    assert "eval_loss" in records[1]


def test_epochs_count_passes_over_the_data(tmp_path: Path) -> None:
    tokens = TOKENS[: 8 * LENGTH + 1]  # eight sequences, two steps a pass
    result = train(random_model([], 1), tokens, options(max_steps=0, epochs=3), tmp_path / "run")
    assert result.steps == 6


# --- data -----------------------------------------------------------------------------------------------


def test_a_pass_takes_every_sequence_once_in_a_seeded_order() -> None:
    tokens = np.arange(10 * 4 + 3, dtype=np.int32)
    batches = TokenBatches(tokens, 4, seed=1)
    assert len(batches) == 10
    first, second = batches.take(0, 10), batches.take(10, 10)
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(0, 40, 4))
    assert first.tolist() != second.tolist()
    assert all(row == list(range(row[0], row[0] + 5)) for row in first.tolist())
    again = TokenBatches(tokens, 4, seed=1)
    assert torch.equal(again.take(7, 6), torch.cat([first[7:], second[:3]]))  # across passes, from any position
    assert TokenBatches(tokens, 4, seed=2).take(0, 10).tolist() != first.tolist()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(np.zeros(LENGTH, np.int32), "one sequence needs 17"), (np.full(200, 97, np.int32), "holds token 97")],
)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path: Path, tokens: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(random_model([2], 4), tokens, options(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (30, {}, "score only those after the first 32"),
        (200, {"eval_max_tokens": 30}, "score only those after the first 32"),
        (200, {"eval_length": 65}, "the model's context of 64"),
        (200, {"eval_length": 16, "eval_stride": 17}, "stride 17"),
        (200, {"eval_length": 1}, "at least 2"),
    ],
)
def test_evaluation_that_would_score_nothing_is_refused(
    tmp_path: Path, tokens: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(random_model([2], 4), TOKENS, options(**changes), tmp_path / "run", some_tokens(tokens, 1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("splits", [[], [2]])
def test_evaluation_equals_scoring_window_by_window(splits: list[int]) -> None:
    """The protocol, and the deployed distribution: hard routing and fast-k."""
    model = random_model(splits, 4, fast_k=7)
    tokens = some_tokens(203, 5)
    nll, hits, n = 0.0, 0, 0
    for start in range(0, len(tokens), 8):
        window = torch.from_numpy(tokens[start : start + 24].astype(np.int64))[None]
        log_probs = model.log_probs(window[:, :-1], "gate_hard", 7)[0]
        fresh = 8 if start == 0 else max(0, start + window.shape[1] - (start + 16))
        for t in range(log_probs.shape[0] - fresh, log_probs.shape[0]):
            nll -= log_probs[t, window[0, t + 1]].item()
            hits += int(log_probs[t].argmax() == window[0, t + 1])
            n += 1
        if start + 24 >= len(tokens):
            break
    got = evaluate(model, tokens, 24, 8)
    assert got.tokens == n == 203 - 16
    assert got.loss == pytest.approx(nll / n, abs=1e-5)
    assert got.accuracy == pytest.approx(hits / n)


def test_the_best_model_is_kept_and_published(tmp_path: Path) -> None:
    """With a learning rate that ruins the model, the best model is an early one."""
    run = tmp_path / "run"
    held_out = some_tokens(200, 1)
    result = train(
        random_model([2], 4),
        TOKENS,
        options(max_steps=8, eval_every=2, lr=3.0, warmup_steps=4, clip_grad_norm=0),
        run,
        held_out,
    )
    evals = {record["step"]: record["eval_loss"] for record in metrics(run) if "eval_loss" in record}
    assert list(evals) == [2, 4, 6, 8]
    assert result.best_loss == min(evals.values()) < result.eval_loss
    best = evaluate(load_model(run / "best"), held_out, 64, 32)
    assert best.loss == pytest.approx(result.best_loss, abs=1e-6)
    assert load_file(run / "model.safetensors")["transformer.wpe.weight"].equal(
        load_file(run / "best" / "model.safetensors")["transformer.wpe.weight"]
    )


# --- trouble --------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_names_the_tensor(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = random_model([2], 4)
    mlp = model.paths["left"].h["3"].mlp
    real = mlp.forward
    calls = 0

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += mlp.training  # not those of the look at the model before it is saved
        return real(x) * (math.inf if calls >= 5 else 1)  # two passes a step: in the third step

    mlp.forward = poisoned
    with pytest.raises(NonFiniteError, match=r"step 3: output of paths\.left\.h\.3\.mlp is not finite") as error:
        train(model, TOKENS, options(save_every=1), run)
    assert error.value.exit_code == 4
    good = load_model(run / "last")
    assert all(p.isfinite().all() for p in good.parameters())
    assert json.loads((run / "last" / "trainer_state" / "state.json").read_text())["step"] == 2
    assert all(p.isfinite().all() for p in model.parameters())  # nothing wrong was learned


def test_a_gradient_that_is_no_number_stops_too(tmp_path: Path) -> None:
    model = random_model([], 1)
    model.get_parameter("transformer.wpe.weight").register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError, match=r"step 1: gradient of transformer\.wpe\.weight"):
        train(model, TOKENS, options(), tmp_path / "run")


@pytest.mark.parametrize("evaluated", [False, True])
def test_weights_too_large_to_use_are_not_published(tmp_path: Path, evaluated: bool) -> None:
    """One step of this size leaves finite weights, and no finite output."""
    run, held_out = tmp_path / "run", some_tokens(300, 1) if evaluated else None
    with pytest.raises(NonFiniteError, match=r"^step 1: after the step .+ is not finite; nothing was saved") as error:
        train(random_model([2], 4), TOKENS, options(max_steps=1, lr=1e38, warmup_steps=0), run, held_out)
    assert error.value.exit_code == 4
    assert sorted(path.name for path in run.iterdir() if path.suffix != ".jsonl") == []


def planted(where: str, model: DMPTForCausalLM, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step `at` leaves an infinite weight, or an infinite moment."""
    real, calls = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        calls.append(self)
        if len(calls) == at:
            weight = model.get_parameter("transformer.wte.weight")
            tensor = weight.data if where == "weight" else self.state[weight][where]
            tensor[96, 3] = math.inf  # of a token that the checked sequence need not hold
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize(
    ("where", "named"),
    [("weight", "parameter transformer.wte.weight"), ("exp_avg_sq", "the optimizer's exp_avg_sq of transformer.wte")],
)
def test_what_is_not_finite_never_replaces_older_files(
    where: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = tmp_path / "run", random_model([2], 4)
    planted(where, model, 4, monkeypatch)
    with pytest.raises(NonFiniteError, match=f"step 4: after the step {named}.* is not finite; .*last keeps"):
        train(model, TOKENS, options(max_steps=4, save_every=2, eval_every=2), run, some_tokens(300, 1))
    assert json.loads((run / "last" / "trainer_state" / "state.json").read_text())["step"] == 2
    for folder in (run / "last", run / "best"):
        assert all(p.isfinite().all() for p in load_model(folder).parameters())
    assert not (run / "config.json").exists()


def test_an_earlier_run_survives_one_that_ends_in_infinite_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(random_model([2], 4), TOKENS, options(max_steps=1), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(NonFiniteError):
        train(random_model([2], 4), TOKENS, options(max_steps=1, lr=1e38, warmup_steps=0), run, overwrite=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_path_that_is_hardly_used_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model([2], 4)
    with torch.no_grad():
        model.gates["root"][2].bias.copy_(torch.tensor([1000.0, 0.0]))
    train(model, TOKENS, options(max_steps=5), tmp_path / "run")
    warnings = [record for record in metrics(tmp_path / "run") if "warning" in record]
    assert len(warnings) == 1
    assert warnings[0]["step"] == 3
    assert "path 'right' gets 0.0%" in warnings[0]["warning"]
    assert "path 'right' gets 0.0%" in capsys.readouterr().err


@pytest.mark.parametrize(("splits", "mode"), [([], "gate_soft"), ([2], "gate_soft"), ([2], "left_only")])
def test_the_bar_shows_the_run_and_changes_nothing(
    tmp_path: Path, splits: list[int], mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = options(train_path_selection=mode)
    train(random_model(splits, 4), TOKENS, settings, tmp_path / "quiet")
    assert "step/s" not in capsys.readouterr().err  # no terminal, no bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(random_model(splits, 4), TOKENS, settings, tmp_path / "shown", extras=Extras(title="dual"))
    err = capsys.readouterr().err
    assert "dual: 100%" in err
    assert "ppl=" in err
    assert "tok/s=" in err
    assert ("routes=left" in err) == (splits == [2] and mode == "gate_soft")
    assert [set(record) for record in metrics(tmp_path / "shown")] == [set(r) for r in metrics(tmp_path / "quiet")]
    assert losses_of(tmp_path / "shown") == losses_of(tmp_path / "quiet")


def test_routes_and_head_usage_are_logged(tmp_path: Path) -> None:
    train(random_model([2], 4), TOKENS, options(max_steps=2), tmp_path / "run")
    record = metrics(tmp_path / "run")[0]
    assert set(record["routes"]) == {"left", "right"}
    assert sum(record["routes"].values()) == pytest.approx(1)
    assert [sum(usage) for usage in record["heads"].values()] == pytest.approx([1, 1])


# --- options --------------------------------------------------------------------------------------------


def test_model_settings_end_up_in_the_checkpoint(tmp_path: Path) -> None:
    """--gate_temp was ignored by the original."""
    settings = options(max_steps=1, gate_temp=0.7, head_gate_temp=0.9, head_topk=1, fast_k=5, dropout=0.25)
    train(random_model([2], 4), TOKENS, settings, tmp_path / "run")
    config = read_config(tmp_path / "run")
    assert (config.gate_temp, config.head_gate_temp, config.head_topk, config.fast_k) == (0.7, 0.9, 1, 5)
    assert (config.resid_pdrop, config.attn_pdrop, config.embd_pdrop) == (0.25, 0.25, 0.25)


def test_the_gate_temperature_reaches_the_gradients(tmp_path: Path) -> None:
    def trained(temp: float) -> DMPTForCausalLM:
        model = random_model([2], 4)
        train(model, TOKENS, options(max_steps=1, gate_temp=temp), tmp_path / str(temp))
        return model

    assert "gates.root.2.weight" in changed(trained(1.2), parameters(trained(3.0)))


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0}, {"lr": -1.0}, {"optimizer": "sgd"}, {"lr_schedule": "step"}, {"max_steps": 0, "epochs": 0},
        {"gate_temp": 0.0}, {"dropout": 1.0}, {"head_topk": 99}, {"train_path_selection": "middle_only"},
        {"freeze_schedule": "no-such-file.json"},
    ],
)  # fmt: skip
def test_impossible_options_are_refused_before_anything_is_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        train(random_model([2], 4), TOKENS, options(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_broken_schedule_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    for text in ("[1]", "{", '{"soon": {}}', '{"0": 3}'):
        path.write_text(text)
        with pytest.raises(InputError, match="freeze schedule"):
            read_freeze_schedule(path)


def test_bf16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    model = random_model([2], 4)
    train(model, TOKENS, options(max_steps=2, bf16=True), tmp_path / "run")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_the_result_says_what_happened(tmp_path: Path) -> None:
    result = train(random_model([], 1), TOKENS, options(max_steps=2), tmp_path / "run", some_tokens(100, 1))
    assert isinstance(result, TrainResult)
    assert result.folder == tmp_path / "run"
    assert result.loss == losses_of(tmp_path / "run")[-1] or math.isfinite(result.loss)
    assert result.eval_loss == metrics(tmp_path / "run")[-1]["eval_loss"]
