"""One path of a DMPT as a model of its own: it computes what that path does, in every tree and storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from dmpt_export.check.tolerances import tolerance
from quant.checkpoint import dequantized_model, load_weights, save_quantized
from quant.forms.weights import form_of
from quant.rules import parse_rule
from quant.single_path import renumbered, save_single_path, single_path
from tests.helpers.cli import run
from tests.helpers.exports import TREES
from tests.helpers.models import random_model, saved_model
from tests.helpers.tolerances import TOLERANCE
from training.checkpoints.checkpoint import model_from_tensors
from training.errors import InputError
from training.model.generation import DMPTForCausalLM

IDS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(7))
FORKED = {name: tree for name, tree in TREES.items() if tree["splits"]}


def cut(model: DMPTForCausalLM, leaf: str) -> DMPTForCausalLM:
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("heads.0.weight")
    config, weights = single_path(model.config, tensors, leaf)
    return model_from_tensors(config, {n: torch.from_numpy(form_of(w).dequantize()) for n, w in weights.items()})


def same(model: DMPTForCausalLM, leaf: str, alone: DMPTForCausalLM) -> None:
    for fast_k in (None, model.config.fast_k):
        ids = IDS % model.config.vocab_size
        want = model.log_probs(ids, f"{leaf}_only", fast_k)
        assert torch.equal(alone.log_probs(ids, "gate_hard", fast_k), want)


@pytest.mark.parametrize("name", FORKED)
def test_a_path_alone_computes_the_same(name: str) -> None:
    model = random_model(**FORKED[name])
    for leaf in model.config.leaves:
        alone = cut(model, leaf)
        assert alone.config.leaves == ["root"]
        same(model, leaf, alone)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_allocation_kind_and_tie(data: st.DataObject) -> None:
    splits = data.draw(st.sampled_from([[1], [2], [1, 2]]))
    count = data.draw(st.integers(1, 6))
    heads = st.lists(st.integers(0, count - 1), min_size=1, max_size=4, unique=True)
    leaves = ["left", "right"] if len(splits) == 1 else ["left_left", "left_right", "right_left", "right_right"]
    allocation = {leaf: data.draw(heads) for leaf in leaves}
    used = sorted({j for own in allocation.values() for j in own})
    allocation = {leaf: [used.index(j) for j in own] for leaf, own in allocation.items()}
    kind: dict[str, Any] = data.draw(
        st.sampled_from([
            {}, {"head_kind": "projected"}, {"head_kind": "projected", "shared_anchor": True},
            {"head_kind": "projected", "head_rank": 3},
        ])
    )  # fmt: skip
    tied = data.draw(st.booleans())
    model = random_model(
        splits, 4, head_allocation=allocation, tie_word_embeddings=tied, next_tokens=1, fast_k=9, **kind
    )
    leaf = data.draw(st.sampled_from(leaves))
    anchors_of_others = {own[0] for other, own in allocation.items() if other != leaf}
    projected = set(allocation[leaf]) & set(model.config.projected_heads)
    if not kind.get("shared_anchor") and projected and set(allocation[leaf][1:]) & anchors_of_others - {0}:
        with pytest.raises(InputError, match="is the anchor of another path"):
            cut(model, leaf)
        return
    alone = cut(model, leaf)
    same(model, leaf, alone)
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(alone.draft_logits("root", 0, h), model.draft_logits(leaf, 0, h))
    numbers = renumbered(model.config, leaf)
    assert [numbers[j] for j in allocation[leaf]] == alone.config.head_allocation["root"]


def test_a_path_has_no_tensor_of_another_one() -> None:
    model = random_model([1, 2], 8, next_tokens=1)
    kept = set(cut(model, "right_left").state_dict())
    assert not any(name.startswith(("paths.", "gates.")) for name in kept)
    assert {name.split(".")[1] for name in kept if name.startswith("heads.")} == {"0", "1"}


@pytest.mark.parametrize("scheme", ["int8", "int4", "int3", "int8-dynamic", "fp16", "delta-r16"])
def test_a_quantized_path_has_the_same_bits(scheme: str, tmp_path: Path) -> None:
    kind = {} if scheme.startswith("delta") else {"head_kind": "projected", "shared_anchor": True}
    allocation = {"left": [0, 1, 2], "right": [5, 3, 4]}
    saved_model(tmp_path / "whole", [2], 6, head_allocation=allocation, fast_k=16, tie_word_embeddings=True, **kind)
    rules = [parse_rule(f"heads.*={scheme}")] if scheme.startswith("delta") else []
    scheme = "int8" if rules else scheme
    save_quantized(tmp_path / "whole", tmp_path / "quantized", scheme=scheme, rules=rules)
    save_single_path(tmp_path / "quantized", "right", tmp_path / "alone")
    same(dequantized_model(tmp_path / "quantized"), "right", dequantized_model(tmp_path / "alone"))
    before, after = load_weights(tmp_path / "quantized")[1], load_weights(tmp_path / "alone")[1]
    assert form_of(after["transformer.h.3.mlp.c_fc.weight"]).scheme == scheme
    assert form_of(after["transformer.wte.weight"]).nbytes == form_of(before["transformer.wte.weight"]).nbytes


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("leaf", ["left", "right"])
def test_an_exported_path_answers_like_the_path(
    make_dmpt: Any, tmp_path: Path, scheme: str | None, leaf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dmpt(
        tmp_path / "whole", splits=[2], head_allocation={"left": [0, 1], "right": [2, 3]}, fast_k=16, next_tokens=2,
        head_kind="projected", shared_anchor=True, domains={"a": "left"},
    )  # fmt: skip
    quantized = [] if scheme is None else ["--scheme", scheme]
    assert run("onnx", tmp_path / "whole", tmp_path / "device", "--only-path", leaf, *quantized) == 0
    model = runtime.load(tmp_path / "device")
    assert list(model.manifest.leaves) == ["root"]
    assert "domains" not in model.manifest.raw
    assert model.manifest.raw["source"]["name"] == f"whole, only path {leaf}"
    prompt = list(range(5, 25))
    if scheme is not None:
        save_quantized(tmp_path / "whole", tmp_path / "quantized", scheme=scheme)
    reference = dequantized_model(tmp_path / ("whole" if scheme is None else "quantized"))
    want = reference.log_probs(torch.tensor([prompt]), f"{leaf}_only", 16)[0].detach().numpy()
    if scheme is None:
        assert abs(model.log_probs(prompt) - want).max() < TOLERANCE["float32", "float"]
    else:
        assert (np.exp(want) * (want - model.log_probs(prompt))).sum(-1).mean() < tolerance("float32", scheme).kl_mean
    size = sum(file.stat().st_size for file in (tmp_path / "device").glob("model.onnx*"))
    assert run("onnx", tmp_path / "whole", tmp_path / "both", *quantized) == 0
    assert size < 0.9 * sum(file.stat().st_size for file in (tmp_path / "both").glob("model.onnx*"))


@pytest.mark.parametrize(("leaf", "message"), [("middle", "choose one of left, right"), ("root", "choose one of")])
def test_an_unknown_path_is_refused(
    tiny_dmpt: Path, tmp_path: Path, leaf: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("onnx", tiny_dmpt, tmp_path / "device", "--only-path", leaf) == 3
    assert message in capsys.readouterr().err


def test_a_model_of_one_path_has_none_to_choose(
    tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("onnx", tiny_gpt2, tmp_path / "device", "--only-path", "root") == 3
    assert "no splits" in capsys.readouterr().err


def test_what_the_whole_models_names_say_is_refused_before_any_work(
    tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_quantized(tiny_dmpt, tmp_path / "quantized", scheme="int8")
    for arguments, code, message in (
        ((tiny_dmpt, "--plan", "plan.json"), 2, "leave it out with --only-path"),
        ((tiny_dmpt, "--scheme", "int8", "--rule", "nonsense"), 2, "nonsense"),
        ((tmp_path / "quantized", "--scheme", "int8"), 3, f"{tmp_path / 'quantized'} is already quantized"),
    ):
        source, *more = arguments
        assert run("onnx", source, tmp_path / "device", "--only-path", "left", *more) == code
        assert message in capsys.readouterr().err
    rule = "transformer.h.3.*=int4"  # only the cut model has this block there
    assert run("onnx", tiny_dmpt, tmp_path / "device", "--only-path", "left", "--scheme", "int8", "--rule", rule) == 0
