"""Compare every loss term with a plain-Python reference; test independence of padding and length, and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.tolerances import TOLERANCE
from training.loop import losses
from training.model.shape import build_tree

B, S = 3, 5
CLOSE = {"abs": TOLERANCE["float64", "loss"]}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def some_mask() -> Tensor:
    return torch.rand(B, S, generator=torch.Generator().manual_seed(9)) < 0.6


def kept(mask: Tensor | None) -> list[tuple[int, int]]:
    return [(b, s) for b in range(B) for s in range(S) if mask is None or mask[b, s]]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


masks = pytest.mark.parametrize("mask", [None, some_mask()], ids=["all", "masked"])


# --- the terms against plain Python ---------------------------------------------------------------------


@masks
def test_load_balance_of_one_split_is_the_squared_distance_from_one_half(mask: Tensor | None) -> None:
    log_w = F.log_softmax(drawn(B, S, 2), -1)
    expected = sum((mean([math.exp(log_w[b, s, side]) for b, s in kept(mask)]) - 0.5) ** 2 for side in (0, 1))
    got = losses.load_balance({"root": log_w}, build_tree([1], 2), mask)
    assert got.item() == pytest.approx(expected, **CLOSE)


@masks
def test_load_balance_below_a_split_counts_tokens_by_how_likely_they_arrive(mask: Tensor | None) -> None:
    log_gates = {name: F.log_softmax(drawn(B, S, 2, seed=i), -1) for i, name in enumerate(("root", "left", "right"))}
    expected = 0.0
    for node, side_of_root in (("root", None), ("left", 0), ("right", 1)):
        arrive = {
            at: 1.0 if side_of_root is None else math.exp(log_gates["root"][(*at, side_of_root)]) for at in kept(mask)
        }
        for side in (0, 1):
            share = math.fsum(w * math.exp(log_gates[node][(*at, side)]) for at, w in arrive.items())
            expected += (share / math.fsum(arrive.values()) - 0.5) ** 2
    got = losses.load_balance(log_gates, build_tree([1, 2], 3), mask)
    assert got.item() == pytest.approx(expected, **CLOSE)


@masks
def test_gold_aux_is_the_log_weight_of_the_leaf_with_the_lower_loss(mask: Tensor | None) -> None:
    log_w, gold = F.log_softmax(drawn(3, B, S), 0), -drawn(3, B, S, seed=1).abs()
    terms = []
    for b, s in kept(mask):
        best = max(range(3), key=lambda leaf: gold[leaf, b, s].item())
        terms.append(-log_w[best, b, s].item())
    assert losses.gold_aux(log_w, gold.argmax(0), mask).item() == pytest.approx(mean(terms), **CLOSE)


def test_gold_aux_teaches_the_gates_and_not_the_leaves() -> None:
    log_w, gold = F.log_softmax(drawn(2, B, S), 0).requires_grad_(), (-drawn(2, B, S).abs()).requires_grad_()
    losses.gold_aux(log_w, gold.argmax(0)).backward()
    assert gold.grad is None
    assert log_w.grad is not None
    assert log_w.grad.abs().sum() > 0


def test_switches_are_the_chance_that_neighbours_drawn_from_the_gates_differ() -> None:
    random = torch.Generator().manual_seed(3)
    log_w = F.log_softmax(torch.randn(4, 2, 9, generator=random), 0)
    w = log_w.exp()
    joined = torch.ones(2, 8, dtype=torch.bool)
    joined[0, 3] = joined[1, 0] = False
    slow = [
        sum(float(w[a, b, t] * w[c, b, t + 1]) for a in range(4) for c in range(4) if a != c)
        for b in range(2)
        for t in range(8)
        if joined[b, t]
    ]
    assert losses.switches(log_w, joined).item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)
    sure = torch.where(torch.arange(4)[:, None, None] == 2, 0.0, -1e4).expand(4, 2, 9)
    assert losses.switches(sure, joined).item() == 0  # gates that never turn


@masks
def test_tether_is_the_mean_kl_from_the_reference(mask: Tensor | None) -> None:
    reference, path = F.log_softmax(drawn(B, S, 7), -1), F.log_softmax(drawn(B, S, 7, seed=1), -1)
    expected = mean(
        [
            math.fsum(math.exp(p) * (p - q) for p, q in zip(reference[at].tolist(), path[at].tolist(), strict=True))
            for at in kept(mask)
        ]
    )
    got = losses.tether(reference.requires_grad_(), path.requires_grad_(), mask)
    assert got.item() == pytest.approx(expected, **CLOSE)
    got.backward()
    assert reference.grad is None
    assert path.grad is not None


@masks
def test_head_balance_is_kl_of_the_mean_weights_to_uniform(mask: Tensor | None) -> None:
    log_pi = F.log_softmax(drawn(B, S, 4), -1)
    means = [mean([math.exp(log_pi[(*at, j)]) for at in kept(mask)]) for j in range(4)]
    expected = math.fsum(p * (math.log(p) - math.log(1 / 4)) for p in means)
    assert losses.head_balance(log_pi, mask).item() == pytest.approx(expected, **CLOSE)


@masks
def test_head_entropy_is_what_lacks_to_log_k(mask: Tensor | None) -> None:
    log_pi = F.log_softmax(drawn(B, S, 4), -1)
    expected = mean([math.log(4) + math.fsum(math.exp(x) * x for x in log_pi[at].tolist()) for at in kept(mask)])
    assert losses.head_entropy(log_pi, 4, mask).item() == pytest.approx(expected, **CLOSE)


def test_head_terms_survive_heads_that_are_left_out() -> None:
    """head_topk gives log pi = -inf: 0 * log 0 counts as 0, and the gradient is finite."""
    logits = drawn(B, S, 4).requires_grad_()
    log_pi = F.log_softmax(logits.masked_fill(torch.tensor([False, True, False, True]), -torch.inf), -1)
    total = losses.head_entropy(log_pi, 2) + losses.head_balance(log_pi)
    total.backward()
    even = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64).log().expand(B, S, 4)
    assert losses.head_entropy(even, 2).item() == pytest.approx(0, **CLOSE)
    assert total.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


# --- padding, length and processes ----------------------------------------------------------------------


def every_term(seed: int, repeat: int, padding: int) -> list[float]:
    """All terms of the same tokens, repeated, and with padded columns of absurd values."""

    log_w = F.log_softmax(drawn(2, B, S, seed=seed), 0)
    gold = -drawn(2, B, S, seed=seed + 1).abs()
    log_pi = F.log_softmax(drawn(B, S, 4, seed=seed + 2), -1)
    ref, path = (F.log_softmax(drawn(B, S, 6, seed=seed + i), -1) for i in (3, 4))

    def stretch(values: Tensor, dim: int) -> Tensor:
        values = torch.cat([values] * repeat, dim)
        shape = list(values.shape)
        shape[dim] = padding
        return torch.cat([values, torch.full(shape, torch.nan, dtype=values.dtype)], dim)

    mask = stretch(torch.ones(B, S, dtype=torch.float64), 1) == 1
    gates = {"root": stretch(log_w.permute(1, 2, 0), 1)}
    return [
        losses.load_balance(gates, build_tree([1], 2), mask).item(),
        losses.gold_aux(stretch(log_w, 2), stretch(gold, 2).argmax(0), mask).item(),
        losses.tether(stretch(ref, 1), stretch(path, 1), mask).item(),
        losses.head_balance(stretch(log_pi, 1), mask).item(),
        losses.head_entropy(stretch(log_pi, 1), 4, mask).item(),
    ]


def test_no_term_depends_on_padding_or_length() -> None:
    """Also when the padding holds NaN: it must not be read."""
    plain = every_term(0, repeat=1, padding=0)
    assert all(math.isfinite(value) and value > 0 for value in plain)
    assert every_term(0, repeat=1, padding=4) == pytest.approx(plain, **CLOSE)
    assert every_term(0, repeat=3, padding=0) == pytest.approx(plain, **CLOSE)


def test_balance_of_two_processes_has_the_gradient_of_the_whole_batch() -> None:
    """Each process sees half; the mean of their gradients must be that of one process with everything."""
    logits = drawn(4, S, 2).requires_grad_()

    def balance(part: Tensor, across: losses.Across = losses.alone) -> Tensor:
        return losses.load_balance({"root": F.log_softmax(part, -1)}, build_tree([1], 2), None, across)

    balance(logits).backward()
    whole = logits.grad
    logits.grad = None
    means = torch.stack([F.log_softmax(part, -1).exp().mean((0, 1)) for part in logits.detach().split(2)])
    for part in logits.split(2):  # `across` replaces a mean over the part by that over both; weights are all 1
        value = balance(part, lambda mean: means.mean(0) if len(mean) == 2 else mean)
        (value / 2).backward()
    assert torch.allclose(logits.grad, whole, rtol=0, atol=CLOSE["abs"])
