"""Projected heads fitted to full ones: against least squares and a slow KL in float64, and through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quant.projection_fit
from quant.projection_fit import fit, least_squares
from quant.projections import leaf_rows, project_heads, routed_rows
from tests.helpers.cli import run
from tests.helpers.models import random_model
from training.checkpoints.checkpoint import load_model, model_from_tensors
from training.errors import InputError
from training.model.config import DMPTConfig
from training.model.generation import DMPTForCausalLM
from training.model.new_shape import projected_fields

WINDOWS = torch.randint(97, (16, 24), generator=torch.Generator().manual_seed(5))
FIT, HELD_OUT = WINDOWS[:12], WINDOWS[12:]
TREES: dict[str, dict[str, Any]] = {
    "dual, fast-k": {"splits": [2], "heads": 8, "fast_k": 16},
    "dual, all heads": {"splits": [2], "heads": 4},
    "quad, head_topk": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1, "seed": 5},
    "tied": {"splits": [], "heads": 3, "fast_k": 9, "tie_word_embeddings": True},
    "full heads besides": {
        "splits": [2], "heads": 2, "fast_k": 7, "head_allocation": {"left": [1, 3, 0, 2], "right": [2, 4]},
    },
    "one anchor of both leaves": {
        "splits": [2], "heads": 2, "fast_k": 7, "head_allocation": {"left": [1, 2, 0], "right": [1, 3, 2]},
    },
}  # fmt: skip


def full_model(projected: DMPTForCausalLM) -> DMPTForCausalLM:
    """The model with full heads that computes what a projected one computes."""
    config = DMPTConfig.from_dict(projected.config.to_dict() | {"head_kind": "full", "head_rank": None})
    tensors = {name: tensor.detach() for name, tensor in projected.state_dict().items() if "projection" not in name}
    if config.tie_word_embeddings:
        tensors.pop("heads.0.weight")
    for heads in config.head_allocation.values():
        for j in heads:
            if j in projected.config.projected_heads:
                matrix = projected.heads[projected.config.matrix_of(leaf_of(config, j), j)].weight.detach()
                tensors[f"heads.{j}.weight"] = matrix + matrix @ product(projected, j)
    return model_from_tensors(config, tensors)


def leaf_of(config: DMPTConfig, j: int) -> str:
    return next(leaf for leaf, heads in config.head_allocation.items() if j in heads)


def product(model: DMPTForCausalLM, j: int) -> Tensor:
    """P of a projected head, [E, E]."""
    tensors = model.state_dict()
    out = torch.eye(model.config.n_embd)
    for name in model.config.projection_names(j):
        out = tensors[name] @ out
    return out


def divergence(full: DMPTForCausalLM, projected: DMPTForCausalLM, windows: Tensor) -> Tensor:
    """KL of every position, as the models are deployed, in float64: [n, S]."""
    with torch.no_grad():
        want, got = (
            model.log_probs(windows, fast_k=full.config.fast_k).double().log_softmax(-1) for model in (full, projected)
        )
    return (want.exp() * (want - got)).sum(-1)


# --- exact recovery ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("tree", TREES)
def test_heads_that_are_projections_are_recovered(tree: str, rank: int | None) -> None:
    made = random_model(**TREES[tree], head_kind="projected", head_rank=rank)
    full = full_model(made)
    assert divergence(full, made, WINDOWS).abs().max() < 1e-5
    got = project_heads(full, WINDOWS, rank)
    assert got.kl < 1e-6
    assert got.perplexity == pytest.approx(got.perplexity_before, rel=1e-4)
    assert got.model.state_dict().keys() == made.state_dict().keys()
    assert got.model.config.projected_heads
    for j in got.model.config.projected_heads:
        torch.testing.assert_close(product(got.model, j), product(made, j), rtol=1e-3, atol=1e-3)


def test_the_rank_is_the_one_asked_for_and_costs_accuracy() -> None:
    full = full_model(random_model([2], 4, fast_k=16, head_kind="projected", head_rank=8))
    by_rank = {rank: project_heads(full, WINDOWS, rank) for rank in (2, 8)}
    for rank, got in by_rank.items():
        assert got.model.state_dict()["heads.1.projection.down.weight"].shape == (rank, 32)
        assert got.model.state_dict()["heads.1.projection.up.weight"].shape == (32, rank)
    assert by_rank[8].kl < 1e-6
    assert by_rank[2].kl > 1e-4


# --- the two steps ----------------------------------------------------------------------------------


def test_least_squares_is_that_of_lapack() -> None:
    random = torch.Generator().manual_seed(0)
    matrix, *heads = (torch.randn(50, 6, generator=random) for _ in range(3))
    weights = torch.rand(50, generator=random)
    got, gram = least_squares(matrix, heads, weights)
    scale = (weights / weights.sum()).double().sqrt().numpy()[:, None]
    free = np.concatenate([matrix.numpy(), np.ones((50, 1))], 1)  # the last column is the constant of each column
    for p, head in zip(got, heads, strict=True):
        want, *_ = np.linalg.lstsq(scale * free, scale * (head - matrix).numpy(), rcond=None)
        np.testing.assert_allclose(p.numpy(), want[:-1], atol=2e-5)  # the damping
    spread = matrix.numpy() - (scale**2).T @ matrix.numpy()
    np.testing.assert_allclose(gram.numpy(), spread.T @ (scale**2 * spread), atol=1e-12)


@pytest.mark.parametrize("tree", TREES)
def test_rows_give_the_divergence_of_the_models(tree: str) -> None:
    """What step 2 minimises, summed over the leaves, is what eval --base would report."""
    full = random_model(**TREES[tree])
    projected = project_heads(full, WINDOWS).model
    config, total = projected.config, 0.0
    routed = routed_rows(full, FIT)
    assert sum(map(len, routed.values())) == FIT.numel()  # no leaf without tokens, which would get all rows
    for leaf, h in routed.items():
        rows = leaf_rows(full, leaf, h, config.projected_heads)
        if not rows.heads:
            continue
        matrix = full.heads[config.head_allocation[leaf][0]].weight.detach()
        with torch.no_grad():
            total += float(rows.kl(matrix, torch.stack([product(projected, j) for j in rows.heads]), slice(None)))
    want = float(divergence(full, projected, FIT).sum())
    assert total == pytest.approx(want, abs=3e-6 * FIT.numel())  # of float32 log-probs


def slow_objective(full: DMPTForCausalLM, projections: dict[int, Tensor], h: Tensor) -> Tensor:
    """Mean KL of rows h (n, E) of a model without splits, in float64, written down from docs/design.md row by row."""
    matrices = [head.weight.detach().double() for head in full.heads]
    log_pi = full.head_log_weights("root", h).detach().double()
    total = torch.zeros((), dtype=torch.float64)
    for x, pi in zip(h.double(), log_pi.exp(), strict=True):
        anchor = torch.softmax(matrices[0] @ x, 0)
        chosen = anchor.topk(full.config.fast_k).indices
        mass = anchor[chosen].sum()
        want = got = pi[0] * anchor[chosen] / mass
        for j, p in projections.items():
            want = want + pi[j] * torch.softmax(matrices[j][chosen] @ x, 0)
            got = got + pi[j] * torch.softmax(matrices[0][chosen] @ (x + p @ x), 0)
        total = total + mass * (want * (want / got).log()).sum()
    return total / len(h)


def test_step_2_reaches_a_minimum_of_a_slow_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant.projection_fit, "PASSES", 400)
    monkeypatch.setattr(quant.projection_fit, "RIDGE", 0.0)
    full = random_model([], 3, fast_k=9, n_embd=8, vocab_size=40, n_head=1, std=0.5, head_gate_temp=20.0)
    h = routed_rows(full, FIT % 40)["root"]
    matrix, *heads = (head.weight.detach() for head in full.heads)
    rows = leaf_rows(full, "root", h, [1, 2])
    start, _ = least_squares(matrix, heads, rows.weights)
    fitted = fit(matrix, {1: heads[0], 2: heads[1]}, [rows], None)
    values, slopes = [], []
    for projections in ({1: start[0], 2: start[1]}, {j: parts[0].double() for j, parts in fitted.items()}):
        own = {j: p.clone().requires_grad_() for j, p in projections.items()}
        value = slow_objective(full, own, h)
        value.backward()
        values.append(float(value.detach()))
        slopes.append(max(float(p.grad.abs().max()) for p in own.values() if p.grad is not None))
    assert values[1] < values[0] / 2
    assert slopes[1] < slopes[0] / 100


def test_the_ridge_keeps_the_fit_near_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    full = random_model([], 3, fast_k=9)
    rows = leaf_rows(full, "root", routed_rows(full, FIT)["root"], [1, 2])
    matrix, *heads = (head.weight.detach() for head in full.heads)
    start, _ = least_squares(matrix, heads, rows.weights)
    away = []
    for ridge in (1.0, 1e7):
        monkeypatch.setattr(quant.projection_fit, "RIDGE", ridge)
        fitted = fit(matrix, {1: heads[0], 2: heads[1]}, [rows], None)
        away.append(float((torch.stack([parts[0] for parts in fitted.values()]) - start).norm() / start.norm()))
    assert away[1] < 1e-3 < away[0]


# --- held-out text, routes --------------------------------------------------------------------------


def test_the_last_quarter_is_measured_and_not_fitted() -> None:
    full = random_model([2], 4, fast_k=16)
    got = project_heads(full, WINDOWS)
    other = project_heads(full, torch.cat([FIT, HELD_OUT.flip(0, 1)]))
    for name, tensor in got.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert other.kl != got.kl
    assert got.tokens == HELD_OUT.numel()
    assert got.kl == pytest.approx(float(divergence(full, got.model, HELD_OUT).mean()), rel=1e-4)
    for model, perplexity in ((full, got.perplexity_before), (got.model, got.perplexity)):
        with torch.no_grad():
            log_probs = model.log_probs(HELD_OUT, fast_k=16)[:, :-1]
        loss = -log_probs.gather(-1, HELD_OUT[:, 1:, None]).double().mean()
        assert perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_nothing_but_the_heads_changes() -> None:
    full = random_model(**TREES["full heads besides"])
    got = project_heads(full, WINDOWS).model
    kept = {name: tensor for name, tensor in full.state_dict().items() if name in got.state_dict()}
    assert {name for name in full.state_dict() if name not in kept} == {"heads.3.weight", "heads.4.weight"}
    assert all(torch.equal(tensor, got.state_dict()[name]) for name, tensor in kept.items())


def test_heads_see_the_routed_rows_their_leaves() -> None:
    model = random_model([2], 4, fast_k=16)
    with torch.no_grad():
        hidden = model.hidden(FIT)
        routes = model.routes(hidden.gates)
        got = routed_rows(model, FIT)
        for i, leaf in enumerate(model.config.leaves):
            torch.testing.assert_close(got[leaf], hidden.leaves[leaf][routes == i])
        model.gates["root"][2].bias[0] += 1000  # now all tokens go left
        torch.testing.assert_close(routed_rows(model, FIT)["right"], hidden.leaves["right"].flatten(0, 1))
    assert project_heads(model, WINDOWS).kl < 1


# --- models that have no such heads -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rank", "match"),
    [
        ({"splits": [2], "heads": 4, "head_kind": "projected"}, None, "already projected"),
        ({"splits": [], "heads": 1}, None, "each is an anchor or head 0"),
        ({"splits": [2], "heads": 2}, None, "each is an anchor or head 0"),
        ({"splits": [2], "heads": 2, "head_allocation": {"left": [1, 0], "right": [2, 1]}}, None, "each is an anchor"),
        ({"splits": [2], "heads": 4}, 33, "head_rank 33 must be from 1 to the model's width 32"),
        ({"splits": [2], "heads": 4}, 0, "head_rank 0 must be"),
        ({"splits": [2], "heads": 2, "head_allocation": {"left": [0, 2], "right": [1, 2]}}, None,
         r"head 2 is shared by leaves with different anchors \(left: head 0, right: head 1\)"),
    ],
)  # fmt: skip
def test_models_that_are_refused(model: dict[str, Any], rank: int | None, match: str) -> None:
    full = random_model(**model)
    with pytest.raises(InputError, match=match):
        projected_fields(full.config, rank)
    with pytest.raises(InputError, match=match):
        project_heads(full, WINDOWS, rank)


# --- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 4])
def test_convert_to_projected_heads_then_quantize_and_export(
    rank: int | None, tiny_dmpt: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if rank is None else ["--head-rank", rank]
    assert run("convert", tiny_dmpt, tmp_path / "out", "--heads", "projected", "--calib", text, *options) == 0
    err = capsys.readouterr().err
    model, source = load_model(tmp_path / "out"), load_model(tiny_dmpt)
    assert (model.config.head_kind, model.config.head_rank) == ("projected", rank)
    assert model.config.projected_heads == [1, 3]
    assert f"{source.num_parameters():,} parameters became {model.num_parameters():,}" in err
    assert "KL to the full heads: " in err
    assert "KL to the full heads: " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "no tokenizer" not in err
    assert run("eval", tmp_path / "out", "--data", text) == 0
    assert run("quantize", tmp_path / "out", tmp_path / "small", "--scheme", "int8") == 0
    assert run("onnx", tmp_path / "small", tmp_path / "device") == 0  # with its check
    assert run("convert", tmp_path / "out", tmp_path / "again", "--heads", "projected", "--calib", text) == 3
    assert "already projected" in capsys.readouterr().err


def test_foreign_text_is_a_warning(tiny_dmpt: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    """A random model is worse than guessing on any text."""
    assert run("convert", tiny_dmpt, tmp_path / "out", "--heads", "projected", "--calib", text) == 0
    assert "worse than guessing among its 300 tokens" in capsys.readouterr().err
