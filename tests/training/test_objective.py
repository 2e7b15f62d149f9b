"""The training loss of a batch: against the model's own log-probs, its gradients, and which terms it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.models import random_model
from tests.helpers.tolerances import TOLERANCE
from training.errors import InputError
from training.loop import cross_entropy
from training.loop.objective import Objective
from training.loop.options import TrainOptions
from training.model.generation import DMPTForCausalLM

ATOL = TOLERANCE["float32", "loss"]


def some_ids(model: DMPTForCausalLM, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(3))


def only_nll(mode: str, **more: float) -> TrainOptions:
    off = {"lb_coef": 0.0, "gold_aux_coef": 0.0, "tether_coef": 0.0}
    return TrainOptions(train_path_selection=mode, **{**off, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [[], [2], [1, 2]], ids=["single", "dual", "quad"])
@pytest.mark.parametrize("mode", ["gate_soft", "gate_hard", "max_prob", "leaf"])
@pytest.mark.parametrize("tied_to_reference", [0.0, 1e-9], ids=["fused", "full"])
def test_the_main_loss_is_the_models_own_log_prob(splits: list[int], mode: str, tied_to_reference: float) -> None:
    model = random_model(splits, 8)
    mode = f"{model.config.leaves[-1]}_only" if mode == "leaf" else mode
    ids = some_ids(model)
    log_probs = model.log_probs(ids[:, :-1], mode)
    expected = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    got = Objective(model, only_nll(mode, tether_coef=tied_to_reference))(ids).terms["nll"]
    assert got.item() == pytest.approx(expected.item(), abs=ATOL)


@pytest.mark.parametrize("splits", [[2], [1, 2]], ids=["dual", "quad"])
def test_gate_expected_is_the_mean_loss_of_routes_drawn_from_the_gates(splits: list[int]) -> None:
    model = random_model(splits, 8)
    ids = some_ids(model)
    inputs, labels = ids[:, :-1], ids[:, 1:, None]
    weights = model.path_log_weights(model.hidden(inputs).gates)
    expected = sum(
        -(weights[leaf].exp() * model.log_probs(inputs, f"{leaf}_only").gather(-1, labels)[..., 0]).mean()
        for leaf in model.config.leaves
    )
    loss = Objective(model, only_nll("gate_expected"))(ids)
    loss.total.backward()
    assert loss.terms["nll"].item() == pytest.approx(expected.item(), abs=ATOL)
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in model.gates.parameters())


def test_gates_that_are_sure_make_gate_expected_the_deployed_loss() -> None:
    model = random_model([2], 4)
    ids = some_ids(model)
    model.config.gate_temp = 1e-4
    got = Objective(model, only_nll("gate_expected"))(ids).terms["nll"]
    hard = -model.log_probs(ids[:, :-1], "gate_hard").gather(-1, ids[:, 1:, None]).mean()
    assert got.item() == pytest.approx(hard.item(), abs=ATOL)


PROJECTED: dict[str, dict[str, Any]] = {
    "projected": {"head_kind": "projected"},
    "low rank": {"head_kind": "projected", "head_rank": 4},
    "one anchor": {"head_kind": "projected", "shared_anchor": True},
}


@pytest.mark.parametrize("splits", [[], [2], [1, 2]], ids=["single", "dual", "quad"])
@pytest.mark.parametrize("mode", ["gate_soft", "gate_hard"])
@pytest.mark.parametrize(("head_topk", "kind"), [(None, "full"), (1, "full"), *((None, kind) for kind in PROJECTED)])
def test_the_fast_k_loss_is_the_models_own_and_so_is_its_gradient(
    splits: list[int], mode: str, head_topk: int | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.ROWS, "cpu", 5)  # several slices, and a short last one
    model = random_model(splits, 8, **PROJECTED.get(kind, {}))
    model.config.fast_k, model.config.head_topk = 7, head_topk
    ids = some_ids(model)
    gradients = []
    for gold_aux in (0.0, 1e-12):  # only routed rows are scored, or all
        got = Objective(model, only_nll(mode, fast_k_loss=True, gold_aux_coef=gold_aux))(ids)
        got.total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    log_probs = model.log_probs(ids[:, :-1], mode, fast_k=7)
    want = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    want.backward()
    assert got.terms["nll"].item() == pytest.approx(want.item(), abs=ATOL)
    for name, p in model.named_parameters():
        if p.grad is None or (mode == "gate_hard" and name.startswith("gates.")):
            continue
        for grads in gradients:
            assert torch.allclose(grads.get(name, torch.zeros(())), p.grad, atol=ATOL), name


def test_a_tether_beside_the_fast_k_loss_leaves_it_as_it_is() -> None:
    model = random_model([2], 8)
    model.config.fast_k = 7
    ids = some_ids(model)
    plain = Objective(model, only_nll("gate_soft", fast_k_loss=True))(ids)
    tied = Objective(model, only_nll("gate_soft", fast_k_loss=True, tether_coef=1e-9))(ids)
    assert tied.terms["nll"].item() == pytest.approx(plain.terms["nll"].item(), abs=ATOL)


def test_what_cannot_be_trained_is_told_with_what_can() -> None:
    with pytest.raises(InputError, match=r"unknown train_path_selection 'gate_soff'.*gate_expected.*left_only"):
        Objective(random_model([2], 4), only_nll("gate_soff"))


def test_a_fast_k_loss_without_candidates_is_refused() -> None:
    with pytest.raises(InputError, match="needs fast_k"):
        Objective(random_model([2], 4), only_nll("gate_soft", fast_k_loss=True))


def test_an_unknown_path_selection_names_all_there_are() -> None:
    with pytest.raises(InputError, match=r"'gate_expect'.*gate_soft.*gate_expected"):
        Objective(random_model([2], 4), only_nll("gate_expect"))


@pytest.mark.parametrize("name", ["lr", "lb_coef", "gate_temp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} {value} must be a number"):
        TrainOptions(**{name: value}).check()


def test_gate_hard_with_and_without_scoring_every_leaf_is_the_same() -> None:
    model, sparse, full = random_model([1, 2], 8), {}, {}
    ids = some_ids(model)
    for options, out in ((only_nll("gate_hard"), sparse), (only_nll("gate_hard", gold_aux_coef=1e-12), full)):
        loss = Objective(model, options)(ids)
        loss.total.backward()
        out |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    body = [name for name in full if not name.startswith("gates.")]
    assert len(body) > 50
    for name in body:
        got = sparse.get(name, torch.zeros(()))  # no gradient at all where no token was routed
        assert torch.allclose(got, full[name], atol=ATOL), name


def test_terms_come_with_their_coefficients_and_only_when_wanted() -> None:
    model = random_model([2], 4)
    ids = some_ids(model)
    assert set(Objective(model, only_nll("gate_soft"))(ids).terms) == {"nll"}
    options = only_nll(
        "gate_soft", lb_coef=0.5, gold_aux_coef=0.25, tether_coef=0.125, head_lb_coef=2.0, head_entropy_coef=4.0,
        switch_coef=8.0,
    )  # fmt: skip
    loss = Objective(model, options)(ids)
    coefs = {"nll": 1, "lb": 0.5, "gold_aux": 0.25, "tether": 0.125, "head_lb": 2, "head_entropy": 4, "switch": 8}
    total = sum(coefs[name.split(".")[0]] * term.item() for name, term in loss.terms.items())
    assert set(loss.terms) == {"nll", "lb", "gold_aux", "switch"} | {
        f"{term}.{leaf}" for term in ("tether", "head_lb", "head_entropy") for leaf in ("left", "right")
    }
    assert loss.total.item() == pytest.approx(total, abs=ATOL)
    routes = model.routes(model.hidden(ids[:, :-1]).gates)
    assert loss.switch_share is not None
    joined = Objective(model, options).joined(ids[:, :-1], None)
    assert loss.switch_share.item() == pytest.approx((routes.diff(dim=1) != 0)[joined].float().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("splits", "mode", "why"), [([], "gate_soft", "has no splits"), ([2], "left_only", "only left is trained")]
)
def test_steady_routes_need_paths_to_choose_from(splits: list[int], mode: str, why: str) -> None:
    with pytest.raises(InputError, match=f"switch_coef is for gates that choose between paths: .*{why}"):
        only_nll(mode, switch_coef=0.1).check_shape(random_model(splits, 2).config)


def test_a_switch_coefficient_for_gates_that_are_frozen_is_refused() -> None:
    with pytest.raises(InputError, match="switch_coef teaches the gates that freeze_split_gates keeps"):
        only_nll("gate_soft", switch_coef=0.1, freeze_split_gates=True).check()


def test_the_tether_holds_to_head_0_as_it_was_at_the_start() -> None:
    """The reference is a copy: training head 0 must not move it, and it has no gradient."""
    model = random_model([], 2)
    objective = Objective(model, only_nll("gate_soft", tether_coef=1.0))
    ids = some_ids(model)
    before = objective.reference.clone()
    with torch.no_grad():
        for j in (0, 1):
            model.heads[j].weight.copy_(before)
    assert objective(ids).terms["tether.root"].item() == pytest.approx(0, abs=ATOL)
    with torch.no_grad():
        model.heads[0].weight.add_(0.5 * torch.randn_like(before))
    assert objective(ids).terms["tether.root"].item() > 0.01
    assert torch.equal(objective.reference, before)
    assert not objective.reference.requires_grad


def test_the_routing_gate_learns_from_the_main_loss_alone() -> None:
    """The original's straight-through gate had no signal; gate_soft must give one."""
    model = random_model([2], 4)
    Objective(model, only_nll("gate_soft"))(some_ids(model)).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in model.gates.parameters())


def test_under_hard_routing_the_gate_learns_from_gold_aux() -> None:
    model = random_model([2], 4)
    Objective(model, only_nll("gate_hard"))(some_ids(model)).total.backward()
    assert all(p.grad is None for p in model.gates.parameters())
    Objective(model, only_nll("gate_hard", gold_aux_coef=1e-2))(some_ids(model)).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.gates.parameters())


def test_the_gate_temperature_changes_the_loss() -> None:
    model = random_model([2], 4)
    ids, objective = some_ids(model), Objective(model, TrainOptions())
    model.config.gate_temp = 1.2
    first = objective(ids)
    model.config.gate_temp = 12.0
    second = objective(ids)
    assert abs(first.terms["nll"].item() - second.terms["nll"].item()) > 1e-3
    assert second.terms["lb"].item() < first.terms["lb"].item()  # softer gates are nearer to one half


def test_a_masked_batch_costs_what_its_tokens_cost() -> None:
    """Rows padded to a common length: same loss as the short rows alone (nothing looks ahead, nothing is counted)."""
    model = random_model([2], 4)
    options = TrainOptions(head_lb_coef=1.0, head_entropy_coef=1.0)
    ids = some_ids(model)
    longer = torch.cat([ids, torch.zeros(2, 5, dtype=torch.int64)], 1)
    mask = torch.arange(longer.shape[1] - 1) < ids.shape[1] - 1
    plain, padded = Objective(model, options)(ids), Objective(model, options)(longer, mask.expand(2, -1))
    for name, term in plain.terms.items():
        assert padded.terms[name].item() == pytest.approx(term.item(), abs=ATOL), name


def test_switches_leave_out_ends_of_text_and_padding() -> None:
    """The routes of a text do not depend on the text before it in a training sequence."""
    model = random_model([2], 2)
    objective = Objective(model, only_nll("gate_soft", switch_coef=1.0))
    ids = torch.tensor([[5, 6, 0, 7, 8, 9, 3]])  # 0 ends a text
    assert objective.joined(ids[:, :-1], None).tolist() == [[True, False, True, True, True]]
    mask = torch.tensor([[False, True, True, True, True, True]])
    assert objective.joined(ids[:, :-1], mask).tolist() == [[False, False, True, True, True]]
    assert "switch" in objective(ids).terms
    assert "switch" not in Objective(random_model([], 2), only_nll("gate_soft", switch_coef=1.0))(ids).terms
