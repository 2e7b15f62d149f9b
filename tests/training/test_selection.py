"""Training the best path: which leaf a unit gets, what learns, and which options fit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models import random_model
from tests.helpers.training_runs import TOKENS, options
from training.cli.recipes import read_recipe
from training.errors import InputError
from training.loop.objective import Objective
from training.loop.options import TrainOptions
from training.loop.selection import SEGMENT_TOKENS, balanced_best, best_leaves
from training.loop.trainer import train
from training.model.shape import Shape


def best(**more: Any) -> TrainOptions:
    fields: dict[str, Any] = {"train_path_selection": "best", "lb_coef": 0.0, "tether_coef": 0.0, "gold_aux_coef": 0.5}
    return TrainOptions(**(fields | more))


@pytest.mark.parametrize(("unit", "size"), [("token", 1), ("segment", SEGMENT_TOKENS), ("sequence", 150)])
def test_a_unit_takes_the_leaf_with_the_largest_sum_of_its_counted_tokens(unit: str, size: int) -> None:
    random = torch.Generator().manual_seed(0)
    gold, mask = -torch.rand(3, 2, 150, generator=random), torch.rand(2, 150, generator=random) < 0.7
    got = best_leaves(gold, mask, unit, balanced=False)
    for b in range(2):
        for start in range(0, 150, size):
            part = slice(start, start + size)
            sums = [sum(float(gold[leaf, b, t]) for t in range(150)[part] if mask[b, t]) for leaf in range(3)]
            assert (got[b, part] == sums.index(max(sums))).all()


@settings(max_examples=60, deadline=None)
@given(leaves=st.integers(2, 4), units=st.integers(1, 7), seed=st.integers(0, 10**6), flat=st.booleans())
def test_a_balanced_choice_keeps_every_leaf_to_its_share(leaves: int, units: int, seed: int, flat: bool) -> None:
    scores = torch.randn(leaves, units, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if flat else scores  # ties
    got = balanced_best(scores)
    most = -(-units // leaves)
    assert all((got == leaf).sum() <= most for leaf in range(leaves))
    allowed = [a for a in product(range(leaves), repeat=units) if all(a.count(leaf) <= most for leaf in range(leaves))]
    total = scores[got, torch.arange(units)].sum().item()
    largest = max(sum(float(scores[leaf, unit]) for unit, leaf in enumerate(a)) for a in allowed)
    assert total == pytest.approx(largest, abs=1e-5) if leaves == 2 else total <= largest + 1e-5
    free = scores.argmax(0)
    if all((free == leaf).sum() <= most for leaf in range(leaves)):
        assert total == pytest.approx(scores.amax(0).sum().item(), abs=1e-5)


@pytest.mark.parametrize("splits", [[2], [1, 2]], ids=["dual", "quad"])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_the_loss_is_that_of_the_best_leaf_and_gates_learn_to_foresee_it(splits: list[int], unit: str) -> None:
    model = random_model(splits, 8)
    ids = torch.randint(0, 97, (3, 13), generator=torch.Generator().manual_seed(3))
    inputs, labels = ids[:, :-1], ids[:, 1:, None]
    gold = torch.stack(
        [model.log_probs(inputs, f"{leaf}_only").gather(-1, labels)[..., 0] for leaf in model.config.leaves]
    )
    chosen = gold.argmax(0) if unit == "token" else gold.sum(-1).argmax(0)[:, None].expand(3, 12)
    loss = Objective(model, best(select=unit))(ids)
    assert loss.terms["nll"].item() == pytest.approx(-gold.gather(0, chosen[None]).mean().item(), abs=1e-4)
    log_w = torch.stack(list(model.path_log_weights(model.hidden(inputs).gates).values()))
    assert loss.terms["gold_aux"].item() == pytest.approx(-log_w.gather(0, chosen[None]).mean().item(), abs=1e-4)
    assert loss.choices["oracle"].item() == pytest.approx(-gold.amax(0).mean().item(), abs=1e-4)
    agree = (model.routes(model.hidden(inputs).gates) == gold.argmax(0)).float().mean()
    assert loss.choices["foreseen"].item() == pytest.approx(agree.item(), abs=1e-6)


def test_only_the_chosen_leaf_learns() -> None:
    """A head that copies the right answer makes left the best leaf everywhere: right's own weights get no gradient."""
    model = random_model([2], 4)
    ids = torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for j in model.config.head_allocation["right"]:
            model.heads[j].weight.mul_(30)  # sure of itself, and wrong
    loss = Objective(model, best(select="sequence"))(ids)
    loss.total.backward()
    own = {name: p.grad for name, p in model.named_parameters() if name.startswith("paths.right.")}
    assert all(grad is None or not grad.any() for grad in own.values())
    assert model.get_parameter("paths.left.h.2.mlp.c_fc.weight").grad.any()  # type: ignore[union-attr]
    assert model.get_parameter("gates.root.0.weight").grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("select", ["token", "segment", "sequence"])
def test_training_and_resuming_are_one_run(select: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"train_path_selection": "best", "select": select, "select_balance": True}
    how |= {"gold_aux_coef": 0.1, "lr_schedule": "constant", "warmup_steps": 1}
    whole, half = random_model([2], 4), random_model([2], 4)
    train(whole, TOKENS, options(max_steps=4, **how), tmp_path / "whole")
    train(half, TOKENS, options(max_steps=2, **how), tmp_path / "half")
    train(half, TOKENS, options(max_steps=4, **how), tmp_path / "half", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), whole.state_dict().values(), strict=True))
    assert '"oracle"' in (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gold_aux_coef": 0.0}, "gates learn by gold_aux_coef alone"),
        (
            {"train_path_selection": "gate_hard", "select_balance": True},
            "select_balance is for train_path_selection best",
        ),
        ({"select": "word"}, "select 'word': choose one of token, segment, sequence"),
    ],
)
def test_options_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        best(**fields).check()


def test_a_model_without_paths_has_no_best_one() -> None:
    with pytest.raises(InputError, match="best is for a model with paths"):
        best().check_shape(Shape.of({"n_layer": 2}))


def test_the_recipe_goes_from_sequences_to_tokens() -> None:
    phases = [TrainOptions.from_dict(phase, "the recipe") for phase in read_recipe("best").phases]
    assert [phase.select for phase in phases] == ["sequence", "segment", "token"]
    assert {phase.train_path_selection for phase in phases} == {"best"}
