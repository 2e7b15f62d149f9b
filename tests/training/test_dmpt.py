"""The torch model: equal to GPT-2 without splits, causal, normalised, and equal with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.helpers.models import random_model, saved_model
from tests.helpers.tolerances import TOLERANCE
from training.errors import InputError
from training.model.generation import DMPTForCausalLM, PathCache, advance

ATOL = TOLERANCE[("float32", "float")]
SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": {"splits": [], "heads": 3, "fast_k": 9, "head_topk": 2},
    "dual": {"splits": [2], "heads": 8, "fast_k": 16},
    "quad": {"splits": [1, 2], "heads": 8, "fast_k": 16},
    "projected": {"splits": [2], "heads": 8, "fast_k": 16, "head_kind": "projected", "head_rank": 5},
    "one anchor": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_kind": "projected", "shared_anchor": True},
}
# How the heads of a leaf find their vocabulary matrices
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "projected": {"head_kind": "projected"},
    "low rank": {"head_kind": "projected", "head_rank": 3},
    "one anchor": {"head_kind": "projected", "shared_anchor": True},
    "one anchor, low rank": {"head_kind": "projected", "shared_anchor": True, "head_rank": 3},
    # head 1 projects in front of both anchors, 0 is full for either leaf, 4 is the right leaf's anchor
    "shared": {"head_kind": "projected", "head_allocation": {"left": [0, 1, 2, 3], "right": [4, 1, 0, 5]}},
    "head 0 no anchor": {
        "head_kind": "projected",
        "shared_anchor": True,
        "head_allocation": {"left": [1, 0], "right": [2, 3]},
    },
}
MODES = ["gate_soft", "gate_hard", "max_prob", "random"]


def modes_of(model: DMPTForCausalLM) -> list[str]:
    return [*MODES, *(f"{name}_only" for name in model.tree if name != "root")]


def some_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_log_prob(name: str) -> None:
    model = random_model(**SHAPES[name])
    ids, changed = some_ids(2, 20), some_ids(2, 20)
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    for mode in modes_of(model):
        for fast_k in (None, 5):
            before, after = (model.log_probs(x, mode, fast_k) for x in (ids, changed))
            torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=ATOL)
            assert not torch.allclose(before[:, 12:], after[:, 12:], atol=0.01)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_every_mode_sums_to_one_and_full_fast_k_is_the_mixture(name: str) -> None:
    model, ids = random_model(**SHAPES[name]), some_ids(2, 16)
    for mode in modes_of(model):
        for fast_k in (None, 1, 7, 97):
            total = model.log_probs(ids, mode, fast_k).logsumexp(-1)
            torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=ATOL)
        full = model.log_probs(ids, mode)
        torch.testing.assert_close(model.log_probs(ids, mode, 97), full, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_random_routing_takes_every_leaf_equally_often_and_no_notice_of_gates(name: str) -> None:
    model, ids = random_model(**SHAPES[name]), some_ids(40, 64)
    leaves = model.config.leaves
    routes = model.random_routes(ids, 64)
    shares = torch.bincount(routes.flatten(), minlength=len(leaves)) / routes.numel()
    torch.testing.assert_close(shares, torch.full((len(leaves),), 1 / len(leaves)), rtol=0, atol=0.05)
    log_probs = model.log_probs(ids[:2], "random", 7, last=5)
    for i, leaf in enumerate(leaves):
        only = model.log_probs(ids[:2], f"{leaf}_only", 7, last=5)
        mine = routes[:2, -5:] == i
        torch.testing.assert_close(log_probs[mine], only[mine], rtol=0, atol=ATOL)
    for gate in model.gates.values():
        gate[2].bias += torch.tensor([100.0, -100.0])
    assert torch.equal(model.log_probs(ids[:2], "random", 7, last=5), log_probs)
    if len(leaves) > 1:
        again = model.random_routes(ids, 64, seed=1)
        assert 0.3 < float((again == routes).float().mean()) * len(leaves) / 2 < 0.7
        # a token's or position's route does not predict the next one
        assert abs(float((routes[:, 1:] == routes[:, :-1]).float().mean()) - 1 / len(leaves)) < 0.05


def slow_head(model: DMPTForCausalLM, leaf: str, j: int, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """docs/design.md, What the model computes: a head's vocabulary matrix and what it multiplies, in float64, from the
    tensors' names alone."""
    tensors = {name: tensor.double() for name, tensor in model.state_dict().items()}
    moves = [name for name in tensors if name.startswith(f"heads.{j}.projection")]
    if not moves:
        return tensors[f"heads.{j}.weight"], h
    move = h
    for name in moves:  # down, then up
        move = torch.tensor([float(row @ move) for row in tensors[name]], dtype=torch.float64)
    owner = 0 if model.config.shared_anchor else model.config.head_allocation[leaf][0]
    return tensors[f"heads.{owner}.weight"], h + move


def slow_fast_k(model: DMPTForCausalLM, leaf: str, h: torch.Tensor, k: int) -> list[float]:
    """docs/design.md, What the model computes, for one hidden row, token by token in float64."""
    anchor, *others = model.config.head_allocation[leaf]
    h64 = h.double()
    gate = model.head_gates[leaf].double()(h64)
    model.head_gates[leaf].float()
    kept = sorted(range(len(gate)), key=lambda i: -gate[i])[: model.config.head_topk or len(gate)]
    weights = [float(torch.exp(gate[i])) if i in kept else 0.0 for i in range(len(gate))]
    pi = [w / sum(weights) for w in weights]
    matrix, x = slow_head(model, leaf, anchor, h64)
    scores = [float(row @ x) for row in matrix]
    top = max(scores)
    exps = [float(torch.exp(torch.tensor(s - top, dtype=torch.float64))) for s in scores]
    p = [e / sum(exps) for e in exps]
    candidates = sorted(range(len(p)), key=lambda v: -p[v])[:k]
    mass = sum(p[c] for c in candidates)
    out = list(p)
    q: list[dict[int, float]] = []
    for j in others:
        matrix, x = slow_head(model, leaf, j, h64)
        row = {c: float(torch.exp(matrix[c] @ x)) for c in candidates}
        q.append({c: value / sum(row.values()) for c, value in row.items()})
    for c in candidates:
        out[c] = mass * (pi[0] * p[c] / mass + sum(w * qj[c] for w, qj in zip(pi[1:], q, strict=True)))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_topk", [None, 1, 2])
@torch.no_grad()
def test_fast_k_equals_the_formula_written_out(head_topk: int | None, kind: str) -> None:
    model = random_model([2], 8, head_topk=head_topk, **KINDS[kind])
    h = model.hidden(some_ids(1, 12)).leaves["right"][0]
    fast = model.fast_mixture("right", h, 11).exp()
    for row, want in zip(fast, [slow_fast_k(model, "right", x, 11) for x in h], strict=True):
        torch.testing.assert_close(row.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_mixture_equals_the_formula_written_out(kind: str) -> None:
    model = random_model([2], 8, **KINDS[kind])
    for leaf, h in model.hidden(some_ids(1, 7)).leaves.items():
        log_pi = model.head_log_weights(leaf, h[0]).double()
        for row, x, got in zip(log_pi, h[0].double(), model.mixture(leaf, h[0]), strict=True):
            want = torch.zeros(97, dtype=torch.float64)
            for log_w, j in zip(row, model.config.head_allocation[leaf], strict=True):
                matrix, moved = slow_head(model, leaf, j, x)
                want += log_w.exp() * torch.softmax(matrix @ moved, 0)
            torch.testing.assert_close(got.double().exp(), want, rtol=1e-4, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_cached_chunked_and_batched_with_padding_equal_one_shot(data: Any) -> None:
    model = random_model(**SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))])
    lengths = data.draw(st.lists(st.integers(8, 24), min_size=1, max_size=3))
    total = max(lengths)
    ids, real = torch.zeros(len(lengths), total, dtype=torch.long), torch.zeros(len(lengths), total, dtype=torch.bool)
    for b, length in enumerate(lengths):  # left padding
        ids[b, total - length :], real[b, total - length :] = some_ids(1, length, seed=b)[0], True
    cache, got, left = PathCache(model.config), [], total
    while left:
        size = data.draw(st.integers(1, left))
        chunk = slice(total - left, total - left + size)
        got.append(advance(model, ids[:, chunk], cache, size, real[:, chunk]))
        left -= size
    log_probs, routes = (torch.cat(parts, dim=1) for parts in zip(*got, strict=True))
    for b, length in enumerate(lengths):
        alone = ids[b : b + 1, total - length :]
        gates = model.hidden(alone).gates
        if gates:
            assert routes[b, total - length :].tolist() == model.routes(gates)[0].tolist()
        want = model.log_probs(alone, fast_k=model.config.fast_k)[0]
        torch.testing.assert_close(log_probs[b, total - length :], want, rtol=0, atol=ATOL)


@torch.no_grad()
def test_node_only_routes_below_the_node_and_nowhere_else() -> None:
    model, ids = random_model(**SHAPES["quad"]), some_ids(1, 30)
    goes_right = (model.hidden(ids).gates["right"].argmax(-1) == 1)[0]
    assert 0 < goes_right.sum() < 30
    want = torch.where(
        goes_right[:, None], model.log_probs(ids, "right_right_only")[0], model.log_probs(ids, "right_left_only")[0]
    )
    torch.testing.assert_close(model.log_probs(ids, "right_only")[0], want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_loss_does_not_depend_on_left_padding(name: str) -> None:
    model, ids = random_model(**SHAPES[name]), some_ids(1, 12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask, labels = (torch.arange(17) >= 5).long()[None], padded.clone()
    labels[:, :6] = -100  # nor the first real token, which has nothing before it
    alone, together = model(ids, labels=ids).loss, model(padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(alone, together, rtol=0, atol=ATOL)


@torch.no_grad()
def test_a_path_that_nobody_takes_is_not_computed() -> None:
    model = random_model(**SHAPES["dual"])
    model.gates["root"][2].bias[:] = torch.tensor([1e6, 0.0])  # always left
    cache = PathCache(model.config)
    for token in some_ids(1, 10)[0]:
        advance(model, token.view(1, 1), cache)
    assert cache.done == {"root": 10, "left": 10, "right": 0}


@pytest.mark.parametrize("name", SHAPES)
def test_generate_greedy_beams_and_batches(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved_model(tmp_path / "model", **SHAPES[name]))
    assert isinstance(model, DMPTForCausalLM)
    model.generation_config.eos_token_id = None
    ids = some_ids(2, 6)
    want = ids.clone()
    with torch.no_grad():
        for _ in range(12):
            want = torch.cat([want, model.log_probs(want, fast_k=model.config.fast_k)[:, -1:].argmax(-1)], dim=1)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist() == want.tolist()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    assert model.generate(padded, attention_mask=mask, **options)[:, 3:].tolist() == want.tolist()

    def score(row: torch.Tensor) -> float:
        with torch.no_grad():
            log_probs = model.log_probs(row[None], fast_k=model.config.fast_k)[0, :-1]
        return float(log_probs.gather(-1, row[1:, None])[5:].sum())

    beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=4, **options)
    assert all(score(b) >= score(g) - 1e-3 for b, g in zip(beams, want, strict=True))


def test_unknown_mode_and_long_input_are_told() -> None:
    model = random_model(**SHAPES["dual"])
    with pytest.raises(InputError, match="left_only, right_only"):
        model.log_probs(some_ids(1, 4), "middle_only")
    with pytest.raises(InputError, match=r"65 tokens .* 64"):
        model.log_probs(some_ids(1, 65))
