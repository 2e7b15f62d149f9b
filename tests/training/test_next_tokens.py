"""Draft heads in training: their loss against a slow reference, which targets count, and what learns from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.models import random_model
from tests.helpers.training_runs import TOKENS, changed, options, parameters
from training.errors import InputError
from training.loop.objective import Objective
from training.loop.options import TrainOptions
from training.loop.trainer import train
from training.model.generation import DMPTForCausalLM
from training.model.init import init_from_gpt2
from training.model.new_shape import NewShape
from training.model.shape import Shape

END = 0  # of random_model()
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4},
    "quad, one anchor": {"splits": [1, 2], "heads": 8, "head_kind": "projected", "shared_anchor": True},
}


def only_drafts(**more: Any) -> TrainOptions:
    fields: dict[str, Any] = {"lb_coef": 0.0, "gold_aux_coef": 0.0, "tether_coef": 0.0, "next_tokens_coef": 1.0}
    return TrainOptions(**(fields | more))


@torch.no_grad()
def slow_loss(model: DMPTForCausalLM, ids: Tensor, mask: Tensor | None) -> float:
    """The definition, in float64 and token by token: cross-entropy of token t + 1 + i, mean over its targets, mean over
    i; a target counts if no token from t + 1 to the one before it ends a text."""
    model = model.double()
    hidden = model.hidden(ids[:, :-1])
    log_w = model.path_log_weights(hidden.gates) if hidden.gates else {"root": torch.zeros(ids[:, :-1].shape)}
    means = []
    for i in range(model.config.next_tokens):
        losses = [0.0]
        for b in range(len(ids)):
            for t in range(ids.shape[1] - 1):
                target = t + 2 + i  # position in ids
                counted = target < ids.shape[1] and (ids[b, t + 1 : target] != END).all()
                if not counted or (mask is not None and not mask[b, t:target].all()):
                    continue
                total = 0.0
                for leaf, h in hidden.leaves.items():
                    anchor = model.config.matrix_of(leaf, model.config.head_allocation[leaf][0])
                    x = h[b, t] + model.get_parameter(f"draft_heads.{leaf}.{i}.weight") @ h[b, t]
                    log_p = torch.log_softmax(model.get_parameter(f"heads.{anchor}.weight") @ x, -1)
                    total -= float(log_w[leaf][b, t].exp() * log_p[ids[b, target]])
                losses.append(total)
        means.append(sum(losses) / max(1, len(losses) - 1))
    return sum(means) / len(means)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_loss_is_its_definition(shape: str, data: st.DataObject) -> None:
    n, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    model = random_model(**SHAPES[shape], next_tokens=n, n_layer=3)
    few = st.integers(0, 3)  # 0 ends a text: often
    ids = torch.tensor(data.draw(st.lists(st.lists(few, min_size=length, max_size=length), min_size=2, max_size=2)))
    mask = None
    if data.draw(st.booleans()):
        real = data.draw(st.lists(st.integers(1, length - 1), min_size=2, max_size=2))
        mask = torch.arange(length - 1)[None] < torch.tensor(real)[:, None]  # padding on the right
    got = Objective(model, only_drafts())(ids, mask).terms["next_tokens"].item()
    assert got == pytest.approx(slow_loss(model, ids, mask), abs=1e-5)


def test_targets_ahead_never_reach_earlier_inputs() -> None:
    """The outputs at a position do not depend on later tokens, with draft heads as without."""
    model = random_model([2], 4, next_tokens=3)
    ids = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    later = ids.clone()
    later[:, 12:] = (later[:, 12:] % 96) + 1
    for leaf, h in model.hidden(ids).leaves.items():
        other = model.hidden(later).leaves[leaf]
        for i in range(3):
            assert torch.equal(model.draft_logits(leaf, i, h)[:, :12], model.draft_logits(leaf, i, other)[:, :12])


def gradients(model: DMPTForCausalLM, coef: float, **more: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    ids = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    Objective(model, only_drafts(next_tokens_coef=coef, **more))(ids).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gates_do_not_learn_from_drafts() -> None:
    model = random_model([2], 4, next_tokens=2)
    without, joint = gradients(model, 0.0), gradients(model, 1.0)
    gates = [name for name in without if name.startswith("gates.")]
    assert gates
    assert all(torch.equal(without[name], joint[name]) for name in gates)


def test_detached_drafts_leave_every_other_gradient_as_it_is() -> None:
    model = random_model([2], 4, next_tokens=2)
    without, joint = gradients(model, 0.0), gradients(model, 1.0)
    detached = gradients(model, 1.0, next_tokens_detached=True)
    drafts = {name for name in joint if name.startswith("draft_heads.")}
    assert detached.keys() - without.keys() == drafts
    assert all(torch.equal(detached[name], joint[name]) for name in drafts)
    assert all(torch.equal(detached[name], grad) for name, grad in without.items())
    assert not torch.equal(joint["transformer.wpe.weight"], without["transformer.wpe.weight"])


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_detached_drafts_change_nothing_else_bit_by_bit(clip: float, tmp_path: Path) -> None:
    """Also where gradients are clipped: the drafts' do not count there."""
    trained = []
    for n in (0, 2):
        torch.manual_seed(0)
        model = init_from_gpt2(random_model([], 1), NewShape([2], heads=4, next_tokens=n or None))
        detached: dict[str, Any] = {"next_tokens_detached": True, "next_tokens_coef": 5.0} if n else {}
        how: dict[str, Any] = {"freeze_head0_steps": 0, "clip_grad_norm": clip}
        train(model, TOKENS, options(max_steps=3, **how, **detached), tmp_path / str(n))
        trained.append(model.state_dict())
    without, with_drafts = trained
    assert all(torch.equal(with_drafts[name], tensor) for name, tensor in without.items())
    assert with_drafts["draft_heads.left.0.weight"].any()


def test_the_coefficient_rises_over_the_given_steps() -> None:
    model = random_model([], 1, next_tokens=1)
    ids = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    objective = Objective(model, only_drafts(next_tokens_coef=0.5, next_tokens_rise=4))
    for step, share in [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)]:
        objective.step = step
        loss = objective(ids)
        expected = loss.terms["nll"] + 0.5 * share * loss.terms["next_tokens"]
        assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_new_draft_heads_predict_what_the_anchor_predicts_and_the_rest_is_as_without() -> None:
    gpt2 = random_model([], 1)
    plain, model = (init_from_gpt2(gpt2, NewShape([2], heads=4, next_tokens=n)) for n in (None, 2))
    own = model.state_dict()
    drafts = [name for name in own if name.startswith("draft_heads.")]
    assert len(drafts) == 4
    assert not any(own[name].any() for name in drafts)
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.state_dict().items())
    h = torch.randn(3, 32)
    assert torch.equal(model.draft_logits("right", 1, h), model.head_logits("right", 2, h))


@pytest.mark.parametrize("mode", ["gate_expected", "gate_hard", "left_only"])
def test_training_freezing_and_resuming_with_draft_heads(mode: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"train_path_selection": mode, "freeze_head0_steps": 0, "head_lr": 1e-3}
    model = random_model([2], 4, next_tokens=2)
    before = parameters(model)
    train(model, TOKENS, options(max_steps=4, **fields), tmp_path / "whole")
    moved = changed(model, before)
    trained = ["left"] if mode == "left_only" else ["left", "right"]
    assert {name for name in moved if name.startswith("draft_heads.")} == {
        f"draft_heads.{leaf}.{i}.weight" for leaf in trained for i in range(2)
    }
    half = random_model([2], 4, next_tokens=2)
    train(half, TOKENS, options(max_steps=4, freeze_schedule='{"0": {"draft_heads": true}}', **fields), tmp_path / "b")
    assert not any(name.startswith("draft_heads.") for name in changed(half, before))


@pytest.mark.parametrize("n", [0, 64, 65, -1])
def test_more_tokens_than_the_context_are_refused(n: int) -> None:
    fields = vars(random_model([], 1).config) | {"next_tokens": n}
    if n == 0:
        assert Shape.of(fields).next_tokens == 0
    else:
        with pytest.raises(InputError, match=rf"next_tokens {n} must be from 0 to 63"):
            Shape.of(fields)


@pytest.mark.parametrize("option", ["next_tokens_rise", "next_tokens_detached"])
def test_options_for_draft_heads_need_some(option: str) -> None:
    shape = Shape.of({"n_layer": 2, "splits": [1]})
    with pytest.raises(InputError, match=f"{option} is for a model with draft heads"):
        TrainOptions(**{option: True}).check_shape(shape)


def test_a_text_shorter_than_the_distance_trains_nothing_and_stays_finite() -> None:
    model = random_model([], 1, next_tokens=5)
    loss = Objective(model, only_drafts())(torch.tensor([[1, 2, 3]]))
    assert math.isfinite(loss.total.item())
    assert np.isfinite(loss.terms["next_tokens"].item())
