"""Heads as deltas: the factors against float64, the folder, the graph against torch, planted faults, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import dmpt_export.onnx.export as export_module
from dmpt_export.cli.main import main
from dmpt_export.cli.onnx import report
from dmpt_export.inspect.summary import summarise
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from dmpt_export.onnx.manifest import describe
from quant.checkpoint import dequantized_model, load_weights, save_quantized, write_quantized
from quant.deltas import quantize_group
from quant.forms.blockwise import BlockwiseTensor
from quant.forms.delta import DeltaTensor
from quant.quantize import quantize_tensors
from quant.reference import low_memory_model
from quant.rules import Rule, anchors_of, assign, default_rules, parse_rule
from quant.schemes.blockwise import int4, int8
from quant.schemes.low_rank import low_rank
from tests.helpers.candidates import scored_candidates
from tests.helpers.models import random_model, saved_model
from training.checkpoints.checkpoint import expected_shapes, load_state
from training.errors import InputError, ValidationError
from training.model.config import DMPTConfig

DELTA = parse_rule("heads.*=delta-r16")


def near_copies(rng: np.random.Generator, n: int, vocabulary: int, width: int, rank: int) -> list[np.ndarray]:
    """An anchor, and heads that differ from it in `rank` directions and a little noise."""
    anchor = rng.normal(size=(vocabulary, width))
    shared = rng.normal(size=(vocabulary, rank))
    heads = [anchor + 0.1 * shared @ rng.normal(size=(rank, width)) for _ in range(n)]
    return [(a + 0.01 * rng.normal(size=a.shape)).astype(np.float32) for a in (anchor, *heads)]


def save_deltas(out: Path, splits: list[int], heads: int, *rules: str, scheme: str = "int8", **fields: Any) -> Path:
    """A quantized folder of a random model; deltas of rank 16 where no rules are given."""
    source = saved_model(out / "source", splits, heads, **fields)
    save_quantized(source, out / "quantized", scheme, rules=[parse_rule(r) for r in rules or [str(DELTA)]])
    return out / "quantized"


@pytest.mark.parametrize(("n", "rank"), [(1, 16), (3, 16), (3, 32), (2, 64)])
def test_factors_are_as_good_as_those_of_a_float64_svd(n: int, rank: int) -> None:
    """The best rank-r error by the singular values, to what rounding the factors costs."""
    rng = np.random.default_rng(rank + n)
    anchor, *heads = near_copies(rng, n, 300, 96, 24)
    stored = int4(anchor)
    left, rights = low_rank(heads, stored, rank)
    assert (left.shape, [right.shape for right in rights]) == ((300, rank), [(rank, 96)] * n)
    deltas = np.concatenate([head - stored.dequantize() for head in heads], axis=1).astype(np.float64)
    u, s, vt = np.linalg.svd(deltas, full_matrices=False)
    best = float(np.linalg.norm(s[rank:]))
    got = left.dequantize().astype(np.float64) @ np.concatenate([right.dequantize() for right in rights], axis=1)
    error, kept = float(np.linalg.norm(deltas - got)), float(np.linalg.norm(s[:rank]))
    # Rounding adds about 4-bit rounding's share (0.1 for normal numbers) of the kept part, independently of the rest.
    assert best * (1 - 1e-6) <= error <= np.hypot(best, 0.13 * kept)
    # The space is the best one: against the exact factors with the same rounding of the left one.
    scores = u[:, :rank] * s[:rank]
    size = np.sqrt(np.square(scores).mean(0))
    rounded = int4((scores / size).astype(np.float32), 256).dequantize() * size
    assert error <= 1.02 * float(np.linalg.norm(deltas - rounded @ vt[:rank]))


def test_full_rank_leaves_only_rounding() -> None:
    rng = np.random.default_rng(2)
    heads = [rng.normal(size=(80, 32)).astype(np.float32) for _ in range(3)]
    tensors = quantize_group({"heads.1.weight": heads[1]}, "heads.0.weight", heads[0], Rule("", "delta-r32"))
    delta = heads[1] - heads[0]
    assert np.linalg.norm(tensors["heads.1.weight"].dequantize() - heads[1]) < 0.12 * np.linalg.norm(delta)
    same = quantize_group({"heads.1.weight": heads[0]}, "heads.0.weight", heads[0], Rule("", "delta-r16"))
    np.testing.assert_allclose(same["heads.1.weight"].dequantize(), heads[0], rtol=0, atol=0)


# --- the model ------------------------------------------------------------------------------------


@settings(max_examples=7, deadline=None)
@given(
    tree=st.sampled_from([([], 3), ([2], 6), ([1, 2], 8)]),
    width=st.sampled_from([32, 40]),
    rank=st.sampled_from([16, 32]),
    block=st.sampled_from(["", ":16"]),
    scheme=st.sampled_from(["int8", "int4"]),
    fast_k=st.sampled_from([None, 1, 16]),
    anchor=st.sampled_from(["int8", "int4", "float32"]),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_graph_gives_the_log_probs_of_the_dequantized_heads(
    tree: tuple[list[int], int], width: int, rank: int, block: str, scheme: str, fast_k: int | None, anchor: str,
    tied: bool, seed: int, tmp_path_factory: Any,
) -> None:  # fmt: skip
    """Float kernels, to fp32 rounding: export_onnx() compares both forms of the graph with torch and raises."""
    folder = tmp_path_factory.mktemp("delta")
    rules = [f"heads.*=delta-r{rank}{block}", f"heads.0={anchor}"]
    sizes = {"n_embd": width, "fast_k": fast_k, "tie_word_embeddings": tied, "seed": seed, "n_head": width // 8}
    quantized = save_deltas(folder, *tree, *rules, scheme=scheme, **sizes)
    parity = export_onnx(quantized, folder / "onnx")["parity"]
    assert parity["float_kernels"]["whole"]["max_abs_diff"] < parity["float_kernels"]["whole"]["kl_mean"] + 1e-4
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        want = dequantized_model(quantized).log_probs(ids, fast_k=fast_k)
        torch.testing.assert_close(low_memory_model(quantized).log_probs(ids, fast_k=fast_k), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("n", "k", "rank"), [(0, 5, 16), (1, 1, 16), (3, 5, 32), (2, 60, 64)])
def test_what_candidates_gain_over_the_anchor(n: int, k: int, rank: int, exact: bool) -> None:
    """The operators alone, also where no row is routed to the leaf: left @ right @ h in float64."""
    config = random_model([], 3, n_embd=64, vocab_size=80, fast_k=k).config
    rng = np.random.default_rng(k)
    arrays = {f"heads.{j}.weight": rng.normal(size=(80, 64)).astype(np.float32) for j in (0, 1, 2)}
    anchor = int8(arrays.pop("heads.0.weight"))
    weights = quantize_group(arrays, "heads.0.weight", anchor, Rule("", f"delta-r{rank}", 16))
    x, c, got = scored_candidates(config, weights, rng, n, 2, exact)
    deltas = np.stack([weights[name].dequantize() - anchor.dequantize() for name in arrays]).astype(np.float64)
    want = np.einsum("jnke,ne->njk", deltas[:, c], x)
    assert got.shape == want.shape
    # a vector of 64 numbers in 8 bits loses at most 1/254 of its largest entry in each
    size = np.abs(deltas).sum(-1).max() * np.abs(x).max(initial=0)
    assert (np.abs(got - want) <= (2e-6 if exact else 1 / 100) * size + 1e-5).all()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_heads_that_several_leaves_share(target: str, tmp_path: Path) -> None:
    """Deltas to one anchor in two leaves: the factor is in the graph once, and each leaf reads its own heads."""
    allocation = {"left": [0, 1, 2, 4], "right": [0, 2, 3, 5]}
    rules = ("heads.5=int8", "heads.*=delta-r16")
    quantized = save_deltas(tmp_path, [2], 6, *rules, head_allocation=allocation, fast_k=16)
    manifest = export_onnx(quantized, tmp_path / "onnx", ExportOptions(target=target))
    stored = {name: tensor["scheme"] for name, tensor in manifest["quantization"]["tensors"].items()}
    assert [stored[f"heads.{j}.weight"] for j in range(6)] == ["int8", *["delta-r16"] * 4, "int8"]
    names = [i.name for i in export_module.build(*load_weights(quantized)).graph.initializers.values()]
    assert len([name for name in names if name.endswith(".left.packed")]) == 1


def test_a_folder_gives_back_the_same_bits(tmp_path: Path) -> None:
    quantized = save_deltas(tmp_path, [2], 6)
    config, weights = load_weights(quantized)
    write_quantized(tmp_path / "again", config, weights, "int8", {"rules": []})
    files = [load_file(folder / "model.safetensors") for folder in (quantized, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])
    deltas = {name: weight for name, weight in weights.items() if isinstance(weight, DeltaTensor)}
    assert sorted(deltas) == [f"heads.{j}.weight" for j in (1, 2, 4, 5)]
    assert deltas["heads.1.weight"].left is deltas["heads.2.weight"].left
    assert deltas["heads.1.weight"].anchor is weights["heads.0.weight"]
    assert sum(weight.nbytes for weight in weights.values()) == sum(array.nbytes for array in files[0].values())


def test_reports_and_inspect_tell_sizes_and_errors(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [2], 6, fast_k=16)
    _, arrays = load_state(source)
    reports = {r.name: r for r in save_quantized(source, tmp_path / "quantized", "int8", rules=[DELTA])}
    config, weights = load_weights(tmp_path / "quantized")
    for name in ("heads.1.weight", "heads.5.weight"):
        weight, said, head = weights[name], reports[name], arrays[name]
        assert isinstance(weight, DeltaTensor)
        assert isinstance(weight.anchor, BlockwiseTensor)
        lost = np.linalg.norm(weight.dequantize() - head)
        assert said.relative_error == pytest.approx(lost / np.linalg.norm(head), rel=1e-4)
        assert said.delta_error == pytest.approx(lost / np.linalg.norm(weight.anchor.dequantize() - head), rel=1e-4)
        assert (said.scheme, said.bytes_after) == ("delta-r16", weight.nbytes)
    assert reports["heads.0.weight"].delta_error is None
    # a leaf's two deltas: 16 codes and a scale a row together, and 16 x 32 bytes with a scale a row each
    assert sum(weights[f"heads.{j}.weight"].nbytes for j in (1, 2)) == 97 * (8 + 4) + 2 * 16 * (32 + 4)
    manifest = export_onnx(tmp_path / "quantized", tmp_path / "onnx")
    told = [summarise(str(tmp_path / kind)) for kind in ("quantized", "onnx", "source")]
    assert told[0]["tensors"] == told[1]["tensors"]
    assert told[0]["tensors"]["heads.1.weight"]["scheme"] == "delta-r16"
    # parameters are the model's, however it is stored; bytes are not
    assert told[0]["parameters"] == told[1]["parameters"] == told[2]["parameters"]
    assert f"touched per token ({told[1]['bytes_touched_per_token'] / 1e6:.2f} MB)" in report(manifest, "device")
    assert told[1]["bytes_touched_per_token"] < told[2]["bytes_touched_per_token"]
    # candidates touch as many rows of the shared factor, and all of the small ones
    plain = describe(config, weights | {f"heads.{j}.weight": arrays["heads.0.weight"][:0] for j in (1, 2, 4, 5)}, "cpu",
                     tmp_path)["bytes_touched_per_token"]  # fmt: skip
    touched = describe(config, weights, "cpu", tmp_path)["bytes_touched_per_token"]
    assert abs(touched - plain - 16 * (8 + 4) - 2 * 16 * (32 + 4)) <= 2


# --- faults ---------------------------------------------------------------------------------------


def scaled(part: str) -> Callable[[DeltaTensor], DeltaTensor]:
    def fault(delta: DeltaTensor) -> DeltaTensor:
        factor = getattr(delta, part)
        return replace(delta, **{part: replace(factor, scales=factor.scales * np.float32(1.02))})

    return fault


def swapped(delta: DeltaTensor) -> DeltaTensor:
    """Two directions of the right factor exchanged."""
    order = np.arange(16)
    order[[0, 1]] = 1, 0
    return replace(
        delta, right=replace(delta.right, packed=delta.right.packed[order], scales=delta.right.scales[order])
    )


@pytest.mark.parametrize("fast_k", [0, 16])
@pytest.mark.parametrize("fault", [scaled("left"), scaled("right"), swapped], ids=["left", "right", "swapped"])
def test_a_planted_fault_fails_verification(
    fault: Callable[[DeltaTensor], DeltaTensor], fast_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = save_deltas(tmp_path, [2], 4, fast_k=16)

    def damaged(folder: Path) -> Any:
        config, weights = load_weights(folder)
        delta = weights["heads.3.weight"]
        assert isinstance(delta, DeltaTensor)
        return config, {**weights, "heads.3.weight": fault(delta)}

    monkeypatch.setattr(export_module, "load_weights", damaged)
    with pytest.raises(ValidationError, match=r"position \d+"):
        export_onnx(quantized, tmp_path / "onnx", ExportOptions(fast_k=fast_k))
    assert not (tmp_path / "onnx").exists()


def plan(*rules: str, heads: dict[str, list[int]] | None = None, tied: bool = False) -> dict[str, str]:
    config = DMPTConfig(
        vocab_size=40, n_positions=8, n_embd=32, n_layer=2, n_head=2, gate_hidden=8, splits=[1],
        head_allocation=heads or {"left": [0, 1], "right": [2, 3]}, tie_word_embeddings=tied,
    )  # fmt: skip
    parsed = [parse_rule(rule) for rule in rules]
    chosen = assign(expected_shapes(config), parsed, default_rules("int4"), tied, anchors_of(config))
    return {name: str(rule).partition("=")[2] for name, rule in chosen.items() if name.startswith("heads")}


def test_a_rule_for_deltas_leaves_anchors_to_the_next() -> None:
    assert plan("heads.*=delta-r16:16", "heads.2=int8") == {
        "heads.0.weight": "int4", "heads.1.weight": "delta-r16:16", "heads.2.weight": "int8",
        "heads.3.weight": "delta-r16:16",
    }  # fmt: skip
    assert plan("heads.*=delta-r32", tied=True, heads={"left": [1, 0], "right": [1, 2]}) == {
        "heads.1.weight": "int4",
        "heads.2.weight": "delta-r32",
    }


@pytest.mark.parametrize(
    ("rule", "heads", "message"),
    [
        ("heads.0=delta-r16", None, "matches heads.0.weight: only a head can be a delta, and only one that is neither"),
        ("*=delta-r16", None, "matches transformer"),
        ("*.c_fc=delta-r16", None, "only a head can be a delta"),
        ("heads.1=delta-r17", None, "unknown scheme 'delta-r17', choose one of .*delta-r16"),
        ("heads.*=delta-r16", {"left": [0, 3], "right": [1, 3, 2]},
         r"heads.3.weight is shared by leaves with different anchors \(heads.0.weight, heads.1.weight\)"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_meant_is_refused(rule: str, heads: dict[str, list[int]] | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        plan(rule, heads=heads)
    assert "\n" not in str(raised.value)


def test_no_head_is_a_delta_to_itself() -> None:
    """One matrix for all leaves, and no leaf has it as its anchor."""
    allocation = {"left": [1, 0], "right": [2, 0]}
    fields: dict[str, Any] = {"head_kind": "projected", "shared_anchor": True, "head_allocation": allocation}
    assert anchors_of(random_model([2], 2, tie_word_embeddings=False, **fields).config) == {}


def test_deltas_are_no_scheme_for_a_whole_model() -> None:
    with pytest.raises(InputError, match=r"delta-r64 is for heads: .*'heads\.\*=delta-r64'"):
        default_rules("delta-r64")


def test_a_rank_that_deltas_cannot_have_names_the_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved_model(tmp_path / "source", [2], 4)
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--scheme", "int8", "--rule", "heads.*=delta-r64"]
    assert main(arguments) == 3
    assert "heads.1.weight: deltas of 1 heads of 97 x 32 have rank 32 at most, not 64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_not_a_number_names_the_head() -> None:
    arrays = {name: tensor.numpy().copy() for name, tensor in random_model([2], 4).state_dict().items()}
    arrays["heads.3.weight"][5, 5] = np.nan
    config = random_model([2], 4).config
    chosen = assign({n: a.shape for n, a in arrays.items()}, [DELTA], default_rules("int8"), False, anchors_of(config))
    with pytest.raises(InputError, match=r"heads\.3\.weight: the matrix holds NaN"):
        quantize_tensors(arrays, chosen, anchors=anchors_of(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("heads.1.weight.left.scales"), r"heads.1.weight.left.packed or .*missing"),
        (lambda tensors: tensors.pop("heads.2.weight.right.packed"), r"heads.2.weight.right.packed or .*missing"),
        (lambda tensors: tensors.update({"heads.2.weight.right.scales": np.ones((3, 1), np.float32)}), "scales is"),
    ],
)
def test_a_damaged_file_is_refused(
    change: Callable[[dict[str, np.ndarray]], Any], message: str, tmp_path: Path
) -> None:
    file = save_deltas(tmp_path, [], 3) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=message):
        load_weights(file.parent)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"anchor": "heads.9.weight"}, "heads.1.weight is a delta to 'heads.9.weight', which is not a stored matrix"),
        ({"anchor": "heads.2.weight"}, "which is not a stored matrix"),
        ({"anchor": None}, "which is not a stored matrix"),
        ({"anchor": []}, "which is not a stored matrix"),
        ({"anchor": "transformer.wpe.weight"}, "heads.2.weight share a factor but differ in anchor"),
        ({"sharers": ["heads.2.weight"]}, "not among its sharers"),
        ({"sharers": "heads.1.weight"}, "not among its sharers"),
        ({"sharers": ["heads.1.weight", "heads.8.weight"]}, "not among its sharers"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = save_deltas(tmp_path, [], 3) / "config.json"
    config = json.loads(file.read_text())
    config["quantization"]["tensors"]["heads.1.weight"] |= entry
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_weights(file.parent)
