"""The training loop: what is frozen, what is saved, and that a resumed run is the same run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_model
from safetensors.torch import load_file
from torch import nn

from training.batches import TokenBatches
from training.checkpoint import load_model, read_config
from training.errors import InputError
from training.evaluation import evaluate
from training.freeze import Freezer, schedule_groups
from training.interrupt import Interrupted
from training.model import DMPTForCausalLM
from training.nonfinite import NonFiniteError
from training.optim import lr_factor, parameter_groups
from training.options import TrainOptions, read_freeze_schedule
from training.trainer import TrainResult, train

LENGTH = 16
REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equal means bitwise equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(**changes: Any) -> TrainOptions:
    base = TrainOptions(
        max_steps=6, max_length=LENGTH, batch_size=2, grad_accum_steps=2, lr=1e-3, head_lr=1e-3, gate_lr=1e-3,
        warmup_steps=2, freeze_head0_steps=0, log_every=1, eval_every=100, save_every=100, dropout=0.1, cpu=True,
    )  # fmt: skip
    return replace(base, **changes)


def some_tokens(n: int = 1500, seed: int = 0) -> np.ndarray:
    """Text with something to learn: each token is most often followed by the same one."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros(n, np.int32)
    for i in range(1, n):
        tokens[i] = (tokens[i - 1] * 5 + 1) % 97 if rng.random() < 0.9 else rng.integers(97)
    return tokens


TOKENS = some_tokens()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    return [record["loss"] for record in metrics(out) if "loss" in record]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


# --- it learns, for every kind of model -----------------------------------------------------------------


@pytest.mark.parametrize(("splits", "heads"), [([], 1), ([], 4), ([2], 4), ([1, 2], 4)])
def test_every_kind_of_model_learns_and_ends_as_a_checkpoint(tmp_path: Path, splits: list[int], heads: int) -> None:
    model = random_model(splits, heads)
    result = train(
        model, TOKENS, options(max_steps=25, tether_coef=0.0, dropout=0.0), tmp_path / "run", some_tokens(300, 1)
    )
    losses = losses_of(tmp_path / "run")
    assert result.steps == 25 and len(losses) == 25
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
    assert saved["step"] == 3 and saved["finished"]
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [3, 3]
    assert "loss" in records[0] and "eval_loss" in records[1]


def test_epochs_count_passes_over_the_data(tmp_path: Path) -> None:
    tokens = TOKENS[: 8 * LENGTH + 1]  # eight sequences, two steps a pass
    result = train(random_model([], 1), tokens, options(max_steps=0, epochs=3), tmp_path / "run")
    assert result.steps == 6


# --- what is trained and what stands still --------------------------------------------------------------


def test_head_0_is_bitwise_unchanged_while_frozen_and_moves_afterwards(tmp_path: Path) -> None:
    """Weight decay and leftover momentum must not move it either."""
    model = random_model([2], 4)
    head = model.heads[0].weight.detach().clone()
    train(model, TOKENS, options(max_steps=4, freeze_head0_steps=4, weight_decay=0.5), tmp_path / "a")
    assert torch.equal(model.heads[0].weight, head)
    assert not torch.equal(model.heads[1].weight, random_model([2], 4).heads[1].weight)
    model = random_model([2], 4)
    train(model, TOKENS, options(max_steps=5, freeze_head0_steps=4), tmp_path / "b")
    assert not torch.equal(model.heads[0].weight, head)


def test_a_tied_head_0_freezes_the_embedding_it_is(tmp_path: Path) -> None:
    model = random_model([2], 4, tie_word_embeddings=True)
    before = parameters(model)
    train(model, TOKENS, options(max_steps=2, freeze_head0_steps=2), tmp_path / "run")
    moved = changed(model, before)
    assert "transformer.wte.weight" not in moved and "transformer.wpe.weight" in moved


def test_the_only_head_of_plain_gpt2_is_never_frozen(tmp_path: Path) -> None:
    model = random_model([], 1)
    before = parameters(model)
    train(model, TOKENS, options(max_steps=2, freeze_head0_steps=5000), tmp_path / "run")
    assert "transformer.wte.weight" in changed(model, before)


def test_what_a_schedule_thaws_is_trained_from_then_on(tmp_path: Path) -> None:
    """The original left parameters that were frozen at the start out of every optimizer group."""
    path = tmp_path / "freeze.json"
    path.write_text(
        json.dumps({"0": {"shared": True, "left_path": True, "lm_headers": {"1": True}}, "3": {"left_path": False}})
    )
    model = random_model([2], 4)
    before = parameters(model)
    train(model, TOKENS, options(max_steps=3, freeze_schedule=str(path)), tmp_path / "a")
    moved = changed(model, before)
    assert not any(name.startswith(("transformer.", "paths.left")) for name in moved)
    assert "heads.1.weight" not in moved and {"heads.0.weight", "heads.2.weight"} <= moved
    model = random_model([2], 4)
    train(model, TOKENS, options(max_steps=5, freeze_schedule=str(path)), tmp_path / "b")
    moved = changed(model, before)
    assert all(name in moved for name in before if name.startswith("paths.left"))
    assert not any(name.startswith("transformer.") for name in moved)


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({"freeze_all_transformer": True}, ("gates", "heads", "head_gates")),
        ({"freeze_split_gates": True}, ("transformer", "paths", "heads", "head_gates")),
        ({"head_only_phase": True}, ("heads", "head_gates")),
        ({"head_only_epochs": 1}, ("heads", "head_gates")),
    ],
)
def test_freeze_flags(flags: dict[str, Any], trained: tuple[str, ...]) -> None:
    model = random_model([2], 4)
    frozen = Freezer(model, options(**flags), {}, epoch_steps=7).frozen(6)
    active = {name.split(".")[0] for name, _ in model.named_parameters() if name not in frozen}
    assert active == set(trained)
    if "head_only_epochs" in flags:
        assert Freezer(model, options(**flags), {}, epoch_steps=7).frozen(7) == frozenset()


def test_a_quad_schedule_knows_the_originals_groups() -> None:
    model = random_model([1, 2], 4)
    groups = schedule_groups(model)
    assert {
        "shared", "left_intermediate", "right_intermediate", "LL", "LR", "RL", "RR", "left_right",
        "gate1", "gate2_left", "gate2_right", "left_path",
    } <= set(groups)  # fmt: skip
    schedule = {0: {"shared": True, "LR": True, "gate2_left": True}, 5: {"LR": False}}
    freezer = Freezer(model, options(), schedule, epoch_steps=1)
    frozen = {name.rsplit(".h.")[0].rsplit(".ln")[0] for name in freezer.frozen(4) if name.startswith("paths")}
    assert frozen == {"paths.left_right"}
    assert not any(name.startswith("paths.") for name in freezer.frozen(5))
    assert any(name.startswith("gates.left.") for name in freezer.frozen(5))


@pytest.mark.parametrize(
    "schedule",
    [{0: {"middle": True}}, {0: {"shared": 1}}, {0: {"lm_headers": {"9": True}}}, {0: {"lm_headers": "all"}}],
)
def test_an_impossible_schedule_is_refused(schedule: dict[int, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="step 0"):
        Freezer(random_model([2], 4), options(), schedule, epoch_steps=1)


def test_dropout_is_off_in_frozen_blocks_only(tmp_path: Path) -> None:
    model = random_model([2], 4)
    freezer = Freezer(model, options(), {0: {"left_path": True}, 2: {"left_path": False}}, epoch_steps=1)
    freezer.apply(0)
    assert not any(module.training for module in model.paths["left"].modules())
    assert all(module.training for module in model.paths["right"].modules())
    freezer.apply(2)
    assert all(module.training for module in model.modules())


def test_everything_frozen_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="everything is frozen"):
        train(random_model([], 1), TOKENS, options(head_only_phase=True), tmp_path / "run")


# --- optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("splits", "heads"), [([], 1), ([2], 4), ([1, 2], 4)])
def test_every_parameter_is_in_exactly_one_group_also_when_frozen(splits: list[int], heads: int) -> None:
    model = random_model(splits, heads)
    for p in model.parameters():
        p.requires_grad_(False)
    settings = options(lr=1.0, head_lr=2.0, gate_lr=3.0, weight_decay=0.5)
    groups = parameter_groups(model, settings)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            kind = name.split(".")[0]
            assert group["lr"] == {"heads": 2.0, "gates": 3.0, "head_gates": 3.0}.get(kind, 1.0)
            share = 0.1 if kind in ("heads", "gates", "head_gates") else 1.0
            assert group["weight_decay"] == (0.5 * share if p.ndim > 1 else 0.0)


def test_the_learning_rate_rises_and_falls_linearly() -> None:
    settings = options(warmup_steps=4)
    assert [lr_factor(step, 12, settings) for step in range(12)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert max(lr_factor(step, 10, options(warmup_steps=1000)) for step in range(10)) == 1.0
    assert lr_factor(9, 10, options(lr_schedule="constant")) == 1.0
    assert lr_factor(7, 12, options(warmup_steps=2, lr_schedule="cosine")) == pytest.approx(0.5)


def test_clipping_looks_at_active_parameters_only(tmp_path: Path) -> None:
    """A stale gradient on a frozen parameter would shrink everybody's step."""
    model = random_model([2], 4)
    model.heads[0].weight.grad = torch.full_like(model.heads[0].weight, 1e9)
    plain = random_model([2], 4)
    for which, m in (("a", model), ("b", plain)):
        train(m, TOKENS, options(max_steps=2, freeze_head0_steps=10), tmp_path / which)
    assert not changed(model, parameters(plain))


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
    """With a learning rate that ruins the model, the best is an early one."""
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


# --- resuming -------------------------------------------------------------------------------------------


def interrupted_at(model: DMPTForCausalLM, run: Path, step: int, settings: TrainOptions, **more: Any) -> None:
    """Train until `step`, then stop as by SIGTERM."""
    before = torch.optim.AdamW.step
    done = 0

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counting)
        with pytest.raises(Interrupted, match=f"after step {step} of") as stop:
            train(model, TOKENS, settings, run, **more)
    assert "--resume" in str(stop.value) and stop.value.exit_code == 130


@pytest.mark.parametrize(("splits", "heads"), [([], 1), ([2], 4)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_run(tmp_path: Path, splits: list[int], heads: int) -> None:
    """With dropout, accumulation, a tether to a head that has moved, log lines across the stop, several passes."""
    settings = options(max_steps=9, log_every=2, freeze_head0_steps=3, tether_coef=0.5, head_lb_coef=0.1, eval_every=4)
    tokens, held_out = TOKENS[: 12 * LENGTH + 1], some_tokens(100, 1)
    whole = random_model(splits, heads)
    train(whole, tokens, settings, tmp_path / "whole", held_out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "TOKENS", tokens)
        interrupted_at(random_model(splits, heads), tmp_path / "parts", 5, settings, eval_tokens=held_out)
    torch.manual_seed(12345)  # whatever the process did in between
    resumed = random_model(splits, heads, seed=99)
    train(resumed, tokens, settings, tmp_path / "parts", held_out, resume=True)

    def numbers(run: Path) -> list[dict[str, Any]]:
        volatile = ("seconds", "tokens_per_s")
        return [{k: v for k, v in record.items() if k not in volatile} for record in metrics(run)]

    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert not changed(resumed, parameters(whole))


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
        ({"model": random_model([], 1, n_layer=2)}, "holds another model"),
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
    with pytest.raises(InputError, match="--resume"):
        train(random_model([], 1), TOKENS, options(max_steps=1), run)
    train(random_model([], 1), TOKENS, options(max_steps=1), run, overwrite=True)
    assert len(losses_of(run)) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no training run"):
        train(random_model([], 1), TOKENS, options(), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_kill_leaves_the_last_complete_checkpoint(tmp_path: Path) -> None:
    """SIGKILL while a checkpoint is being written, and at other moments: what is there loads and resumes."""
    script = tmp_path / "go.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests")!r}]
        import torch, training.state as state
        from models import random_model
        from test_trainer import TOKENS, options
        from training.trainer import train
        torch.set_num_threads(1)
        real, saves, moment = state.write_tensors, 0, int(sys.argv[2])
        def deadly(*args, **kwargs):
            global saves
            saves += 1
            if saves == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        state.write_tensors = deadly
        train(random_model([2], 4), TOKENS, options(save_every=1), sys.argv[1], progress=False)
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


# --- trouble --------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_names_the_tensor(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = random_model([2], 4)
    real = model.paths["left"].h["3"].mlp.forward
    calls = 0

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(x) * (math.inf if calls >= 5 else 1)  # two passes a step: in the third step

    model.paths["left"].h["3"].mlp.forward = poisoned
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


def test_a_path_that_is_hardly_used_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model([2], 4)
    with torch.no_grad():
        model.gates["root"][2].bias.copy_(torch.tensor([1000.0, 0.0]))
    train(model, TOKENS, options(max_steps=5), tmp_path / "run")
    warnings = [record for record in metrics(tmp_path / "run") if "warning" in record]
    assert len(warnings) == 1 and warnings[0]["step"] == 3
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
    train(random_model(splits, 4), TOKENS, settings, tmp_path / "shown", title="dual")
    err = capsys.readouterr().err
    assert "dual: 100%" in err and "ppl=" in err and "tok/s=" in err
    assert ("routes=left" in err) == (splits == [2] and mode == "gate_soft")
    assert [set(record) for record in metrics(tmp_path / "shown")] == [set(r) for r in metrics(tmp_path / "quiet")]
    assert losses_of(tmp_path / "shown") == losses_of(tmp_path / "quiet")


def test_routes_and_head_usage_are_logged(tmp_path: Path) -> None:
    train(random_model([2], 4), TOKENS, options(max_steps=2), tmp_path / "run")
    record = metrics(tmp_path / "run")[0]
    assert set(record["routes"]) == {"left", "right"} and sum(record["routes"].values()) == pytest.approx(1)
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
