"""Trained and frozen parameters: frozen groups and schedules, and the optimizer's groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import random_model
from tests.helpers.training_runs import TOKENS, changed, options, parameters
from training.errors import InputError
from training.loop.freeze import Freezer, schedule_groups
from training.loop.optim import lr_factor, parameter_groups
from training.loop.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_head_0_is_bitwise_unchanged_while_frozen_and_moves_afterwards(tmp_path: Path) -> None:
    """Weight decay and leftover momentum must not change it either."""
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
    assert "transformer.wte.weight" not in moved
    assert "transformer.wpe.weight" in moved


def test_projected_heads_freeze_by_number_and_learn_at_the_rate_of_heads(tmp_path: Path) -> None:
    """Also under fast-k, where they read a matrix that is not theirs."""
    kind: dict[str, Any] = {"head_kind": "projected", "head_rank": 4, "shared_anchor": True, "fast_k": 16}
    model = random_model([2], 4, **kind)
    rates = {name: group["lr"] for group in parameter_groups(model, options(head_lr=0.5)) for name in group["names"]}
    assert {rates[name] for name in rates if "projection" in name} == {0.5}
    before = parameters(model)
    freeze = json.dumps({"0": {"lm_headers": {"1": True, "2": True}}})
    train(model, TOKENS, options(max_steps=2, fast_k_loss=True, freeze_schedule=freeze), tmp_path / "run")
    projections = {name for name in changed(model, before) if "projection" in name}
    assert projections == {"heads.3.projection.down.weight", "heads.3.projection.up.weight"}
    assert "heads.0.weight" in changed(model, before)


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
    assert "heads.1.weight" not in moved
    assert {"heads.0.weight", "heads.2.weight"} <= moved
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
    groups = schedule_groups(model.config)
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


# --- optimizer


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
    """A stale gradient on a frozen parameter would shrink the step of all parameters."""
    model = random_model([2], 4)
    model.heads[0].weight.grad = torch.full_like(model.heads[0].weight, 1e9)
    plain = random_model([2], 4)
    for which, m in (("a", model), ("b", plain)):
        train(m, TOKENS, options(max_steps=2, freeze_head0_steps=10), tmp_path / which)
    assert not changed(model, parameters(plain))
