"""init: a new DMPT computes the same as its GPT-2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.cli import run
from tests.helpers.models import modes
from tests.helpers.tolerances import TOLERANCE
from training.checkpoints.checkpoint import load_model, load_state
from training.checkpoints.folder import read_head_allocation
from training.errors import InputError
from training.model.generation import DMPTForCausalLM
from training.model.init import init_from_gpt2
from training.model.new_shape import NewShape, default_heads

LIMIT = TOLERANCE["float32", "torch"]
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> DMPTForCausalLM:
    return load_model(tiny_gpt2)


@pytest.fixture(scope="module")
def gpt2_log_probs(tiny_gpt2: Path) -> Tensor:
    """Log-probs of Hugging Face's own GPT-2: the oracle."""
    from transformers import GPT2LMHeadModel

    with torch.no_grad():
        return torch.log_softmax(GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()(IDS).logits, -1)


# --- init_from_gpt2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "more"),
    [
        (None, {}),
        ([1], {"heads": 2}),
        ([1, 3], {"head_allocation": {"left_left": [0], "left_right": [1], "right_left": [2, 3, 4],
                                      "right_right": [5, 6, 7]}, "head_topk": 2}),
        ([1, 2, 3], {}),
        ([], {"heads": 3}),
        ([], {"heads": 1}),
        ([2], {"tie": False}),
        ([2], {"head_allocation": {"left": [3, 1], "right": [2, 0]}}),
        ([2], {"heads": 4, "head_kind": "projected"}),
        ([1, 2], {"heads": 8, "head_kind": "projected", "shared_anchor": True, "head_rank": 4}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_without_noise_every_mode_says_what_gpt2_says(
    splits: list[int] | None, more: dict[str, Any], gpt2: DMPTForCausalLM, gpt2_log_probs: Tensor
) -> None:
    model = init_from_gpt2(gpt2, NewShape(splits, **more), noise=0)
    assert model.config.splits == ([2] if splits is None else splits)
    for mode in modes(model):
        for fast_k in (None, 16, 300):
            torch.testing.assert_close(model.log_probs(IDS, mode, fast_k), gpt2_log_probs, atol=LIMIT, rtol=0)


@torch.no_grad()
def test_noise_moves_all_heads_but_the_anchors(gpt2: DMPTForCausalLM, gpt2_log_probs: Tensor) -> None:
    wte = gpt2.transformer.wte.weight
    noisy = init_from_gpt2(gpt2, noise=0.05, seed=1)
    for j, head in enumerate(noisy.heads):
        moved = (head.weight - wte).std() / wte.std()
        assert float(moved) == pytest.approx(0 if j in (0, 4) else 0.05, rel=0.05)
    distances = [float((a.weight - b.weight).abs().max()) for a in noisy.heads[1:4] for b in noisy.heads[5:]]
    assert min(distances) > 0  # no two heads got the same noise
    for mode in modes(noisy):
        difference = (noisy.log_probs(IDS, mode) - gpt2_log_probs).abs().max()
        assert LIMIT < float(difference) < 1


@torch.no_grad()
def test_default_noise_is_small_but_there(gpt2: DMPTForCausalLM, gpt2_log_probs: Tensor) -> None:
    model = init_from_gpt2(gpt2)
    assert model.config.head_allocation == {"left": [0, 1, 2, 3], "right": [4, 5, 6, 7]}
    difference = float((model.log_probs(IDS) - gpt2_log_probs).abs().max())
    assert LIMIT < difference < 0.05


@pytest.mark.parametrize("rank", [None, 6])
@torch.no_grad()
def test_projections_start_small_and_anchors_exact(rank: int | None, gpt2: DMPTForCausalLM) -> None:
    shape = NewShape([1, 2], heads=8, head_kind="projected", head_rank=rank, shared_anchor=True)
    model = init_from_gpt2(gpt2, shape, noise=0.01)
    h = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    sizes = {j: float((model.head_input(j, h) - h).norm() / h.norm()) for j in range(8)}
    anchors = {heads[0] for heads in model.config.head_allocation.values()}
    for j, size in sizes.items():
        assert size == pytest.approx(0 if j in anchors else 0.1, rel=0.5 if rank else 0.2), j
    assert not torch.equal(model.head_input(1, h), model.head_input(3, h))
    model.requires_grad_(True)
    with torch.enable_grad():  # an anchor that projects by zero still learns
        model.log_probs(IDS, "gate_soft")[..., 7].sum().backward()
    last = model.config.projection_names(2)[-1]
    assert float(model.get_parameter(last).grad.abs().max()) > 0


@torch.no_grad()
def test_noise_spares_the_matrix_that_all_leaves_share(gpt2: DMPTForCausalLM) -> None:
    """Also where head 0 is no anchor: the anchors project in front of its matrix."""
    allocation = {"left": [1, 0], "right": [2, 3]}
    shape = NewShape(head_allocation=allocation, tie=False, head_kind="projected", shared_anchor=True)
    model = init_from_gpt2(gpt2, shape, noise=0.5)
    assert torch.equal(model.heads[0].weight, gpt2.transformer.wte.weight)


def test_same_seed_same_bits_other_seed_others(gpt2: DMPTForCausalLM) -> None:
    a, b, c = (init_from_gpt2(gpt2, seed=seed).state_dict() for seed in (3, 3, 4))
    drawn = [name for name in a if name.endswith("weight") and name.startswith(("gates", "head_gates", "heads"))]
    assert all(torch.equal(a[name], b[name]) for name in a)
    different = {name for name in a if not torch.equal(a[name], c[name])}
    assert different == {name for name in drawn if name not in ("heads.0.weight", "heads.4.weight")}


def test_gates_start_left_and_head_gates_near_uniform(gpt2: DMPTForCausalLM) -> None:
    model = init_from_gpt2(gpt2, NewShape([1, 2], gate_hidden=24), gate_bias=0.4)
    for gate in model.gates.values():
        assert gate[2].bias.tolist() == pytest.approx([0.4, 0.0])  # (b, b) would favour neither side
        assert gate[0].weight.shape == (24, 32)
        assert gate[2].weight.std().item() > 0
    with torch.no_grad():
        hidden = model.hidden(IDS)
        for leaf, h in hidden.leaves.items():
            pi = model.head_log_weights(leaf, h).exp()
            torch.testing.assert_close(pi, torch.full_like(pi, 1 / pi.shape[-1]), atol=0.05, rtol=0)


def test_paths_are_copies_that_share_no_memory(gpt2: DMPTForCausalLM) -> None:
    model = init_from_gpt2(gpt2, NewShape(tie=False))
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert {tensor.data_ptr() for tensor in gpt2.state_dict().values()}.isdisjoint(pointers)


def test_tie(gpt2: DMPTForCausalLM, make_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    assert init_from_gpt2(gpt2).heads[0].weight.shape == (300, 32)
    assert init_from_gpt2(gpt2).config.tie_word_embeddings
    assert not init_from_gpt2(gpt2, NewShape(tie=False)).config.tie_word_embeddings
    make_gpt2(tmp_path, tie_word_embeddings=False)
    untied = load_model(tmp_path)
    model = init_from_gpt2(untied, noise=0)
    assert torch.equal(model.heads[5].weight, untied.heads[0].weight)
    assert not torch.equal(model.heads[5].weight, untied.transformer.wte.weight)
    with pytest.raises(InputError, match="not tied"):
        init_from_gpt2(untied, NewShape(tie=True))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"splits": [4]}, "do not fit 4 blocks"),
        ({"splits": [0]}, "do not fit 4 blocks"),
        ({"splits": [2, 2]}, "do not fit 4 blocks"),
        ({"splits": [3, 1]}, "do not fit 4 blocks"),
        ({"heads": 3}, "do not divide evenly"),
        ({"heads": 0}, "do not divide evenly"),
        ({"heads": -2}, "do not divide evenly"),
        ({"head_allocation": {"left": [0]}}, "head_allocation names leaves"),
        ({"head_allocation": {"left": [0], "right": [2]}}, "without a gap"),
        ({"head_allocation": {"left": [0], "right": []}}, "distinct head ids"),
        ({"fast_k": 301}, "fast_k 301"),
        ({"fast_k": 0}, "fast_k 0"),
        ({"head_topk": 5}, "head_topk 5"),
        ({"noise": -1.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"noise": float("inf")}, "noise"),
        ({"gate_hidden": 0}, "gate_hidden"),
        ({"head_kind": "small"}, "head_kind 'small' must be one of full, projected"),
        ({"head_rank": 4}, "head_rank and shared_anchor need head_kind projected"),
        ({"shared_anchor": True}, "head_rank and shared_anchor need head_kind projected"),
        ({"head_kind": "projected", "head_rank": 0}, "head_rank 0 must be from 1 to n_embd"),
        ({"head_kind": "projected", "head_rank": 33}, "head_rank 33 must be from 1 to n_embd"),
    ],
)
def test_impossible_wishes(arguments: dict[str, Any], match: str, gpt2: DMPTForCausalLM) -> None:
    with pytest.raises(InputError, match=match):
        init_from_gpt2(gpt2, NewShape(**{name: value for name, value in arguments.items() if name != "noise"}),
                       noise=arguments.get("noise", 0.0))  # fmt: skip


def test_only_from_a_model_without_splits_and_with_one_head(tiny_dmpt: Path, gpt2: DMPTForCausalLM) -> None:
    for model in (load_model(tiny_dmpt), init_from_gpt2(gpt2, NewShape([], heads=2))):
        with pytest.raises(InputError, match="already has splits"):
            init_from_gpt2(model)
    single = init_from_gpt2(gpt2, NewShape([], heads=1))
    assert init_from_gpt2(single).config.splits == [2]


def test_default_heads() -> None:
    assert [default_heads(n) for n in (1, 2, 4, 8, 16)] == [4, 8, 8, 8, 16]


# --- dmpt-export init -------------------------------------------------------------------------------


def test_init_command(
    tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpt2_log_probs: Tensor
) -> None:
    out = tmp_path / "out"
    assert run("init", tiny_gpt2, out, "--splits", "1,2", "--heads", 8, "--fast-k", 20, "--head-topk", 1,
               "--noise", 0, "--seed", 9, "--gate-hidden", 8, "--gate-bias", 1.5) == 0  # fmt: skip
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "dmpt-export train" in shown.err
    model = load_model(out)
    config = model.config
    assert (config.splits, config.fast_k, config.head_topk, config.gate_hidden) == ([1, 2], 20, 1, 8)
    assert (config.head_kind, config.shared_anchor) == ("projected", True)
    assert model.gates["left"][2].bias.tolist() == [1.5, 0.0]
    with torch.no_grad():
        torch.testing.assert_close(model.log_probs(IDS, fast_k=20), gpt2_log_probs, atol=LIMIT, rtol=0)
    assert (out / "tokenizer.json").read_bytes() == (tiny_gpt2 / "tokenizer.json").read_bytes()
    assert run("init", tiny_gpt2, out) == 3
    assert load_model(out).config.splits == [1, 2]
    assert run("init", tiny_gpt2, out, "--overwrite") == 0
    assert load_model(out).config.splits == [2]


@pytest.mark.parametrize(
    ("text", "splits"), [("", [2]), (" ", [2]), ("none", []), ("None", []), ("3", [3]), ("1, 3", [1, 3])]
)
def test_splits_option(text: str, splits: list[int], tiny_gpt2: Path, tmp_path: Path) -> None:
    assert run("init", tiny_gpt2, tmp_path / "out", "--splits", text) == 0
    assert load_state(tmp_path / "out")[0].splits == splits


def test_head_allocation_option(tiny_gpt2: Path, tmp_path: Path) -> None:
    allocation = {"right": [1, 2], "left": [0]}
    (tmp_path / "heads.json").write_text(json.dumps(allocation))
    assert run("init", tiny_gpt2, tmp_path / "out", "--head-allocation", tmp_path / "heads.json") == 0
    assert load_state(tmp_path / "out")[0].head_allocation == allocation


@pytest.mark.parametrize("content", ["[]", "{", '{"left": 0}', '{"left": ["0"]}', '{"left": [true]}', '{"left": null}'])
def test_damaged_head_allocation(content: str, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(InputError, match=r"heads\.json"):
        read_head_allocation(tmp_path / "heads.json")


BAD_INIT = [
    (["--splits", "9"], 3, "splits [9]"),
    (["--splits", "six"], 2, "'six'"),
    (["--splits", "1,,2"], 2, "'1,,2'"),
    (["--fast-k", "1000"], 3, "fast_k 1000"),
    (["--heads", "3"], 3, "3 heads"),
    (["--heads", "many"], 2, "many"),
    (["--heads", "2", "--head-allocation", "x.json"], 2, "exclude each other"),
    (["--head-allocation", "missing.json"], 3, "missing.json is missing"),
    (["--noise", "-1"], 2, "--noise"),
    (["--noise", "1e39"], 3, "NaN or infinity"),
    (["--gate-bias", "nan"], 2, "is not a finite number"),
    (["--heads", "1000000000000"], 5, "heads 1000000000000 needs"),
    (["--gate-hidden", "10000000000000000000"], 5, "gate_hidden"),
    (["--seed", "-1"], 2, "-1"),
    (["--head-kind", "full", "--head-rank", "4"], 2, "--head-rank and --shared-anchor need --head-kind projected"),
    (["--head-kind", "full", "--shared-anchor"], 2, "--head-rank and --shared-anchor need --head-kind projected"),
    (["--head-kind", "projected", "--head-rank", "33"], 3, "head_rank 33"),
    (["--nonsense"], 2, "nonsense"),
]


@pytest.mark.parametrize(("options", "code", "text"), BAD_INIT)
def test_bad_options(
    options: list[str], code: int, text: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("init", tiny_gpt2, tmp_path / "deep" / "out", *options) == code
    shown = capsys.readouterr()
    assert text in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert code == 2 or len(shown.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_empty_allocation_is_no_default(tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heads.json").write_text("{}")
    assert run("init", tiny_gpt2, tmp_path / "out", "--head-allocation", tmp_path / "heads.json") == 3
    assert "head_allocation names leaves []" in capsys.readouterr().err


def test_bad_folders(tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").touch()
    for source, out, text in (
        (tmp_path / "none", tmp_path / "out", "does not exist"),
        (notes, tmp_path / "out", "no config.json"),
        (tiny_gpt2, notes, "is not empty"),
        (tiny_gpt2, notes / "notes.txt", "is a file"),
        (tiny_gpt2, tiny_gpt2, "is not empty"),
    ):
        assert run("init", source, out) == 3
        assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "notes.txt"]
