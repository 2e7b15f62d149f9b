"""Domains of text: which sequences have which, what serves them, and the losses against plain references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.models import random_model
from tests.helpers.tolerances import TOLERANCE
from training.errors import InputError
from training.loop import losses
from training.loop.objective import Objective
from training.loop.options import TrainOptions
from training.loop.watch import Meter
from training.model.domains import even_domains, heads_of, leaves_of
from training.model.shape import build_tree, even_allocation, leaf_names
from training.text.batches import TokenBatches
from training.text.domains import NONE, Domains, joined

CLOSE = {"abs": TOLERANCE["float64", "loss"]}
ATOL = TOLERANCE["float32", "loss"]
IDS = torch.randint(0, 97, (4, 13), generator=torch.Generator().manual_seed(3))
OWN = torch.tensor([0, 1, NONE, 0])  # the domains of these sequences


def only_domains(**more: Any) -> TrainOptions:
    off = {"lb_coef": 0.0, "gold_aux_coef": 0.0, "tether_coef": 0.0, "domain_coef": 1.0}
    return TrainOptions(**{"train_path_selection": "gate_expected", **off, **more})


# --- which text is of which domain ----------------------------------------------------------------------


@example([(1, 0), (1, 1), (1, 0)], 3)
@example([(1, 0), (2, 0)], 3)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(NONE, 2)), min_size=1, max_size=6), st.integers(1, 7))
def test_a_window_has_the_domain_of_all_its_tokens_or_none(pieces: list[tuple[int, int]], length: int) -> None:
    labels = [label for tokens, label in pieces for _ in range(tokens)]
    count = len(labels) // length
    windows = [set(labels[i * length : (i + 1) * length]) for i in range(count)]
    expected = [window.pop() if len(window) == 1 else NONE for window in windows]
    assert Domains.of("abc", pieces).of_windows(count, length).tolist() == expected


def test_texts_are_joined_with_their_domains() -> None:
    tokens, domains = joined([(None, np.arange(3)), ("b", np.arange(2)), ("a", np.arange(4)), ("b", np.arange(1))])
    assert tokens.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert domains.names == ("b", "a")
    assert (domains.ends.tolist(), domains.labels.tolist()) == ([3, 5, 9, 10], [NONE, 0, 1, 0])
    with pytest.raises(InputError, match="belong to another text"):
        domains.of_windows(3, 4)
    with pytest.raises(InputError, match="domain 'b' has no text"):
        joined([("a", np.arange(4)), ("b", np.arange(0))])


def test_sequences_keep_their_domains_in_every_pass() -> None:
    batches = TokenBatches(np.arange(8 * 5 + 1), 5, seed=1)
    batches.labels = np.arange(8).astype(np.int16)
    for position in (0, 6, 13):
        ids, labels = batches.take(position, 8), batches.domains(position, 8)
        assert labels is not None
        assert (ids[:, 0] // 5).tolist() == labels.tolist()


# --- what serves a domain -------------------------------------------------------------------------------


@given(st.integers(1, 3), st.data())
def test_by_default_every_path_serves_one_domain(depth: int, data: st.DataObject) -> None:
    leaves = leaf_names(list(range(1, depth + 1)), depth + 1)
    names = [f"d{i}" for i in range(data.draw(st.integers(2, len(leaves))))]
    allocation = even_allocation(leaves, 2 * len(leaves))
    served = even_domains(names, allocation)
    assert list(served) == names
    assert sorted(leaf for one in served.values() for leaf in leaves_of(one, allocation)) == sorted(leaves)


def test_heads_serve_a_domain_with_the_leaves_that_have_them() -> None:
    allocation = {"left": [0, 1, 2], "right": [3, 1]}
    assert leaves_of([1], allocation) == ["left", "right"]
    assert leaves_of([3], allocation) == ["right"]
    assert heads_of([1, 2], allocation) == {"left": [1, 2], "right": [1]}
    assert heads_of("left", allocation) == {}


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"a": "middle"}, "there is no path 'middle', choose one of left, right"),
        ({"a": [0, 9]}, "at least one of 0, 1, 2, 3"),
        ({"a": []}, "at least one of 0, 1, 2, 3"),
        ({"a b": "left"}, "letters, digits"),
    ],
)
def test_a_domain_that_nothing_serves_is_refused(domains: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_model([2], 4, domains=domains)


def test_the_field_survives_a_checkpoint(tmp_path: Path) -> None:
    from training.checkpoints.checkpoint import read_config, save_model

    domains: dict[str, Any] = {"code": "left", "prose": [2, 3]}
    save_model(random_model([2], 4, domains=domains), tmp_path / "model")
    assert read_config(tmp_path / "model").domains == domains
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()) | {"domains": {"code": 1}})
    )
    with pytest.raises(InputError, match="domains must be an object"):
        read_config(tmp_path / "model")


# --- the losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_taught_is_the_mean_log_weight_of_what_serves(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = F.log_softmax(torch.randn(3, 5, 4, generator=generator, dtype=torch.float64), -1)
    serves = torch.tensor([[True, False, True, False], [False] * 4, [False, True, False, False]])
    weight = torch.rand(3, 5, generator=generator, dtype=torch.float64) if weighted else torch.ones(3, 5).double()
    total, norm = 0.0, 0.0
    for b, t in np.ndindex(3, 5):
        mine = [math.exp(log_p[b, t, c]) for c in range(4) if serves[b, c]]
        if mine:
            total -= weight[b, t].item() * math.log(math.fsum(mine))
            norm += weight[b, t].item()
    assert losses.taught(log_p, serves, weight).item() == pytest.approx(total / norm, **CLOSE)


def test_taught_without_anything_to_teach_is_zero_with_a_finite_gradient() -> None:
    log_p = torch.full((2, 3, 2), -math.inf, requires_grad=True)
    loss = losses.taught(log_p, torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert log_p.grad is not None
    assert torch.equal(log_p.grad, torch.zeros(2, 3, 2))


def test_balance_of_some_sequences_is_that_of_a_batch_of_them() -> None:
    generator = torch.Generator().manual_seed(2)
    gates = {name: F.log_softmax(torch.randn(4, 5, 2, generator=generator), -1) for name in ("root", "left", "right")}
    mask, counted = torch.rand(4, 5, generator=generator) < 0.7, torch.tensor([True, False, True, False])
    tree = build_tree([1, 2], 3)
    expected = losses.load_balance({name: w[counted] for name, w in gates.items()}, tree, mask[counted])
    got = losses.load_balance(gates, tree, mask, counted=counted)
    assert got.item() == pytest.approx(expected.item(), abs=ATOL)
    root = losses.load_balance(gates, tree, mask, nodes=["root"])
    assert root.item() == pytest.approx(losses.load_balance({"root": gates["root"]}, tree, mask).item(), abs=ATOL)


@pytest.mark.parametrize(
    ("splits", "domains"),
    [
        ([2], {"a": "left", "b": "right"}),
        ([1, 2], {"a": "left", "b": "right_left"}),
        ([1, 2], {"a": "root", "b": "right"}),
        ([2], {"a": "left", "b": [5, 7]}),
        ([], {"a": [0, 1], "b": [2]}),
    ],
    ids=["dual", "quad", "all leaves", "heads", "heads of one path"],
)
def test_the_domain_terms_are_those_of_the_models_own_gates(splits: list[int], domains: dict[str, Any]) -> None:
    model = random_model(splits, 8, domains=domains)
    hidden, allocation = model.hidden(IDS[:, :-1]), model.config.head_allocation
    expected: dict[str, float] = {}
    if splits:
        weights = {leaf: w.exp() for leaf, w in model.path_log_weights(hidden.gates).items()}
        per_token = [
            -math.log(math.fsum(weights[leaf][b, t].item() for leaf in leaves_of(domains["ab"[OWN[b]]], allocation)))
            for b, t in np.ndindex(4, 12) if OWN[b] != NONE
        ]  # fmt: skip
        expected["domain"] = math.fsum(per_token) / len(per_token)
    for leaf, h in hidden.leaves.items():
        total, norm = 0.0, 0.0
        for b, t in np.ndindex(4, 12):
            places = heads_of(domains["ab"[OWN[b]]], allocation).get(leaf) if OWN[b] != NONE else None
            if places:
                weight = weights[leaf][b, t].item() if splits else 1.0
                pi = model.head_log_weights(leaf, h)[b, t].exp()
                total -= weight * math.log(pi[places].sum().item())
                norm += weight
        if norm:
            expected[f"domain.{leaf}"] = total / norm
    loss = Objective(model, only_domains(), domains=("a", "b"))(IDS, domains=OWN)
    found = {name: value.item() for name, value in loss.terms.items() if name.startswith("domain")}
    assert found == pytest.approx(expected, abs=1e-5)
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_balance_counts_within_each_domain_where_it_may_choose() -> None:
    """Domain a has all leaves under left, b one leaf: left is balanced for a, nothing for b, all for the rest."""
    model = random_model([1, 2], 8, domains={"a": "left", "b": "right_right"})
    gates = model.hidden(IDS[:, :-1]).gates
    log_gates = {name: F.log_softmax(g / model.config.gate_temp, -1) for name, g in gates.items()}
    some = {label: label == OWN for label in (0, NONE)}
    expected = sum(
        share * losses.load_balance({n: w[some[label]] for n, w in log_gates.items()}, model.tree, nodes=nodes).item()
        for label, share, nodes in ((0, 0.5, ["left"]), (NONE, 0.25, None))
    )
    loss = Objective(model, only_domains(lb_coef=1.0), domains=("a", "b"))(IDS, domains=OWN)
    assert loss.terms["lb"].item() == pytest.approx(expected, abs=ATOL)


def test_masked_tokens_and_tokens_without_a_domain_teach_nothing() -> None:
    model = random_model([2], 4, domains={"a": "left", "b": "right"})
    objective = Objective(model, only_domains(), domains=("a", "b"))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[2] = True
    loss = objective(IDS, mask, OWN)
    assert loss.terms["domain"].item() == 0.0
    own = objective(IDS[:1], domains=OWN[:1]).terms["domain"].item()
    mask[0] = True
    assert objective(IDS, mask, OWN).terms["domain"].item() == pytest.approx(own, abs=ATOL)


def test_a_text_without_domains_has_the_loss_it_had() -> None:
    model = random_model([2], 4)
    plain = Objective(model, only_domains(lb_coef=0.1))(IDS)
    assert set(plain.terms) == {"nll", "lb"}


def test_passes_without_a_domain_do_not_change_what_is_taught() -> None:
    model = random_model([2], 4, domains={"a": "left", "b": "right"})
    objective, meter, alone = Objective(model, only_domains(), domains=("a", "b")), Meter(), Meter()
    for own, meters in ((OWN, (meter, alone)), (torch.full((4,), NONE), (meter,))):
        loss = objective(IDS, domains=own)
        for one in meters:
            one.add(loss)
    assert meter.means()["as_taught"] == alone.means()["as_taught"] > 0
    meter.reset()
    meter.add(loss)
    assert "as_taught" not in meter.means()


@pytest.mark.parametrize("term", ["taught", "balance"])
def test_two_processes_with_unequal_domains_have_the_gradient_of_the_whole_batch(term: str) -> None:
    """Three of the four known sequences are in one process; the mean of the gradients must be that of all of them."""
    own, tree = torch.tensor([0, 1, 0, NONE, NONE, 1]), build_tree([1], 2)
    logits = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()

    def value(part: Tensor, labels: Tensor, across: losses.Across) -> Tensor:
        log_w = F.log_softmax(part, -1)
        if term == "taught":
            serves = torch.tensor([[True, False], [False, True], [False, False]])[labels]
            return losses.taught(log_w, serves, (labels >= 0)[:, None].expand(part.shape[:2]).double(), across)
        return losses.load_balance({"root": log_w}, tree, None, across, counted=labels == 1)

    value(logits, own, losses.alone).backward()
    whole, logits.grad = logits.grad, None
    seen: list[list[Tensor]] = [[], []]

    def record(into: list[Tensor]) -> losses.Across:
        return lambda mean: into.append(mean.detach()) or mean  # type: ignore[func-returns-value]

    for process, (part, labels) in enumerate(zip(logits.detach().split(3), own.split(3), strict=True)):
        value(part, labels, record(seen[process]))
    means = [(a + b) / 2 for a, b in zip(*seen, strict=True)]
    for part, labels in zip(logits.split(3), own.split(3), strict=True):
        left = iter(means)
        (value(part, labels, lambda _, left=left: next(left)) / 2).backward()  # type: ignore[misc]
    assert torch.allclose(logits.grad, whole, rtol=0, atol=CLOSE["abs"])
