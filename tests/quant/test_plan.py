"""The plan: knapsack against brute force, damages against whole runs of the model, and the files on disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dmpt_export.cli.main import main
from quant.calibration import Calibration, read_calibration
from quant.checkpoint import load_weights
from quant.forms.blockwise import BlockwiseTensor
from quant.forms.weights import form_of
from quant.planning import damage_table
from quant.planning.damage_table import Measurements
from quant.planning.groups import Group, groups_of
from quant.planning.knapsack import BUCKETS, Frontier
from quant.planning.plan import Option, Target, make_plan
from quant.planning.planned import save_planned
from quant.quantize import quantize_tensor
from quant.rules import anchors_of, parse_rule
from tests.helpers.models import random_calibration, saved_model
from training.checkpoints.checkpoint import load_model, load_state
from training.errors import InputError

OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 50).map(float)), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


@pytest.fixture
def quantize(tiny_dmpt: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """quantize(OUT, *options) runs the verb on the tiny DMPT and returns (exit code, stdout, stderr)."""

    def run(out: str | None, *options: str) -> tuple[int, str, str]:
        places = [str(tiny_dmpt), *([str(tmp_path / out)] if out else [])]
        code = main(["quantize", *places, "--calib", str(text), "--cache-dir", str(tmp_path / "cache"), *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# --- knapsack -----------------------------------------------------------------------------------------


def brute(options: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """(bytes, damage) of every choice."""
    return [
        (sum(size for size, _ in choice), sum(damage for _, damage in choice)) for choice in itertools.product(*options)
    ]


def cost(options: list[list[tuple[int, float]]], chosen: list[int]) -> tuple[int, float]:
    return brute([[pairs[i]] for pairs, i in zip(options, chosen, strict=True)])[0]


@given(OPTIONS, st.integers(0, 200), st.integers(0, 250))
def test_frontier_is_the_best_of_all_choices(options: list[list[tuple[int, float]]], size: int, damage: int) -> None:
    frontier = Frontier(options, 200)
    within = [pair for pair in brute(options) if pair[0] <= size]
    chosen = frontier.within(size)
    assert (chosen is None) == (not within)
    if chosen is not None:
        got = cost(options, chosen)
        assert got[0] <= size
        assert got[1] == min(pair[1] for pair in within)
    good = [pair for pair in brute(options) if pair[1] <= damage]
    least = frontier.smallest(damage)
    assert (least is None) == (not good)
    if least is not None:
        assert cost(options, least)[0] == min(pair[0] for pair in good)
        assert cost(options, least)[1] <= damage


def test_rounding_never_takes_more_than_it_is_given() -> None:
    rng = np.random.default_rng(0)
    options = [[(int(size), float(1 / size)) for size in rng.integers(10**6, 10**7, 4)] for _ in range(20)]
    limit = 90_000_000
    chosen = Frontier(options, limit).within(limit)
    assert chosen is not None
    size, damage = cost(options, chosen)
    assert size <= limit
    finer = Frontier([[(size // 50, damage) for size, damage in pairs] for pairs in options], limit // 50)
    best = finer.within((limit - 20 * (limit // BUCKETS + 1)) // 50)
    assert best is not None
    assert damage <= cost(options, best)[1]


def test_a_target_of_divergence_holds_when_damages_do_not_add_up() -> None:
    """The whole costs three times the sum of its parts: the plan must be stricter than its prediction."""
    groups = [Group((f"heads.{i}",), (f"heads.{i}.weight",), 100) for i in range(4)]
    options = [[Option("int8", 100, 0.001), Option("int4", 50, 0.01)] for _ in groups]
    parts = {0: 0.001, 1: 0.01}
    plan = make_plan(groups, options, Target(kl=0.07), (10, 410, 0), lambda chosen: 3 * sum(parts[i] for i in chosen))
    assert plan.measured_kl <= 0.07
    assert sum(plan.chosen) == 2
    assert plan.bytes == 10 + 300
    with pytest.raises(InputError, match=r"the least is 0\.012"):
        make_plan(groups, options, Target(kl=0.01), (10, 410, 0), lambda chosen: 3 * sum(parts[i] for i in chosen))


# --- damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_dmpt", "tiny_quad", "tiny_gpt2"])
def test_damage_equals_a_whole_run_of_the_changed_model(model: str, text: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    _, arrays = load_state(folder)
    calibration = read_calibration(text, folder, 128)
    float_model = load_model(folder)
    damage = damage_table.damage_on(float_model, calibration)
    want = log_probs(float_model, calibration)
    for group in [*groups_of({name: array.shape for name, array in arrays.items()}, {}), everything(arrays)]:
        changed = {}
        for name in group.tensors:
            tensor, _ = quantize_tensor(name, arrays[name], parse_rule(f"{name}=int4"))
            changed[name] = tensor
        slow = load_model(folder)
        slow.load_state_dict(
            {name: torch.from_numpy(form.dequantize()) for name, form in changed.items()}, strict=False
        )
        if slow.config.tie_word_embeddings:
            slow.tie_weights()
        got = log_probs(slow, calibration)
        assert damage.of(changed) == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)
    assert damage.of({}) == 0, "the weights are not put back"


def everything(arrays: dict[str, Any]) -> Group:
    groups = groups_of({name: array.shape for name, array in arrays.items()}, {})
    return Group(("*",), tuple(name for group in groups for name in group.tensors), 0)


def log_probs(model: Any, calibration: Calibration) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model.log_probs(calibration.windows, fast_k=model.config.fast_k).double()
    return out


# --- the verb -----------------------------------------------------------------------------------------


def test_planned_model_is_as_large_as_planned_and_as_good_as_measured(
    quantize: Callable[..., Any], tmp_path: Path, tiny_dmpt: Path
) -> None:
    code, out, _ = quantize("planned", "--target-bits", "7", "--json", "--candidates", "int8,int4,int4:128")
    assert code == 0
    told = json.loads(out)
    plan = json.loads((tmp_path / "planned/plan.json").read_text())
    assert told["plan"] == plan == json.loads((tmp_path / "planned/quantization_report.json").read_text())["plan"]
    with safe_open(tmp_path / "planned/model.safetensors", framework="np") as file:
        on_disk = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    _, arrays = load_state(tiny_dmpt)
    weights = sum(array.size for array in arrays.values())
    assert on_disk == plan["bytes"] == told["total"]["bytes_after"] <= 7 * weights / 8
    assert {group["chosen"] for group in plan["groups"]} > {"int8"}, "all alike: nothing was chosen"
    assert "<svg" in (tmp_path / "planned/quantization_report.svg").read_text()

    replayed, _, _ = quantize("replayed", "--plan", str(tmp_path / "planned/plan.json"))
    assert replayed == 0
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("planned", "replayed"))
    assert first == again


@pytest.mark.parametrize("size", [155_000, 170_000])
def test_the_file_is_no_larger_than_the_target(quantize: Callable[..., Any], tmp_path: Path, size: int) -> None:
    code, _, err = quantize("planned", "--target-size", str(size), "--candidates", "int8,int4,int4:16,delta-r16")
    assert code == 0, err
    assert 0.85 * size < (tmp_path / "planned/model.safetensors").stat().st_size <= size


def test_a_calibrated_plan_replays_too(quantize: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--target-kl", "0.2", "--candidates", "int4-gptq,int4-gptq:16,int8,delta-r16")
    assert quantize("planned", *options)[0] == quantize("again", *options)[0] == 0
    assert quantize("replayed", "--plan", str(tmp_path / "planned/plan.json"))[0] == 0
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("planned", "again", "replayed")}
    assert len(files) == 1
    plan = json.loads((tmp_path / "planned/plan.json").read_text())
    assert plan["measured_kl"] <= 0.2
    heads = {group["patterns"][0]: group for group in plan["groups"] if group["anchor"]}
    assert heads["heads.1"]["anchor"] == "transformer.wte.weight"
    assert heads["heads.3"]["anchor"] == "heads.2.weight"
    assert all("delta-r16" in [option["scheme"] for option in group["options"]] for group in heads.values())


def test_a_killed_plan_goes_on(tiny_dmpt: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = read_calibration(text, tiny_dmpt, 128)
    measured: list[int] = []
    of = damage_table.Damage.of

    def counted(self: Any, changed: Any) -> float:
        measured.append(1)
        if len(measured) == 7:
            raise KeyboardInterrupt
        return of(self, changed)

    monkeypatch.setattr(damage_table.Damage, "of", counted)
    arguments = (tiny_dmpt, None, Target(bits=7), calibration)
    with pytest.raises(KeyboardInterrupt):
        save_planned(*arguments, tmp_path / "cache", "int8,int4")
    plan, _ = save_planned(*arguments, tmp_path / "cache", "int8,int4")
    groups = len(plan.groups)
    assert len(measured) == 7 + (2 * groups - 6) + 1, "what was measured is measured again"
    fresh, _ = save_planned(*arguments, tmp_path / "other", "int8,int4")
    assert fresh == plan


def test_damages_are_remembered_for_this_model_and_text_alone(tiny_dmpt: Path, text: Path, tmp_path: Path) -> None:
    config, arrays = load_state(tiny_dmpt)
    calibration = read_calibration(text, tiny_dmpt, 128)
    path = Measurements(config, arrays, calibration, tmp_path).path
    assert Measurements(config, arrays, read_calibration(text, tiny_dmpt, 64), tmp_path).path != path
    config.head_gate_temp *= 2
    assert Measurements(config, arrays, calibration, tmp_path).path != path
    config.head_gate_temp /= 2
    arrays["heads.1.weight"] = arrays["heads.1.weight"] + np.float32(1e-3)
    assert Measurements(config, arrays, calibration, tmp_path).path != path


@pytest.mark.parametrize("shared", [False, True])
def test_a_plan_measures_projections_as_one_group(shared: bool, tmp_path: Path) -> None:
    source = saved_model(
        tmp_path / "source", [2], 6, fast_k=16, head_kind="projected", head_rank=16, shared_anchor=shared
    )
    config, arrays = load_state(source)
    calibration = random_calibration(source)
    groups = groups_of({name: array.shape for name, array in arrays.items()}, anchors_of(config))
    (projections,) = [group for group in groups if str(group) == "heads.*.projection*"]
    assert set(projections.tensors) == {name for j in config.projected_heads for name in config.projection_names(j)}
    assert not any(group.anchor for group in groups)  # nothing that could be a delta
    measured = Measurements(config, dict(arrays), calibration, tmp_path / "cache")
    ((option,),) = measured.options([projections], [["int4:16"]])
    model = load_model(source).requires_grad_(False)
    want = model.log_probs(calibration.windows, fast_k=16).double()
    for name in projections.tensors:
        tensor, _ = quantize_tensor(name, arrays[name], parse_rule("*=int4:16"))
        model.get_parameter(name).data = torch.from_numpy(tensor.dequantize())
    got = model.log_probs(calibration.windows, fast_k=16).double()
    assert option.kl == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)
    plan, _ = save_planned(source, tmp_path / "planned", Target(bits=7.0), calibration, tmp_path / "cache", "int8,int4")
    assert str(projections) in {str(group) for group in plan.groups}
    _, weights = load_weights(tmp_path / "planned")
    assert not form_of(weights["heads.2.projection.down.weight"]).is_float


def test_dry_run_writes_no_model(quantize: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = quantize(None, "--target-bits", "7", "--dry-run", "--candidates", "int8,int4")
    assert code == 0
    assert "bits per weight" in out
    assert quantize(None, "--scheme", "int4", "--dry-run")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_report_names_every_tensor_and_its_damage(quantize: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = quantize("int4", "--scheme", "int4", "--tensors")
    report = json.loads((tmp_path / "int4/quantization_report.json").read_text())
    _, weights = load_weights(tmp_path / "int4")
    assert code == 0
    assert {tensor["name"] for tensor in report["tensors"]} == set(weights)
    worst = max(report["tensors"], key=lambda tensor: tensor["kl"] or 0)
    assert "worst KL alone" in out
    assert f"{worst['kl']:.5f} {worst['name']}\n" in out
    for tensor in report["tensors"]:
        weight = weights[tensor["name"]]
        quantized = isinstance(weight, BlockwiseTensor)
        assert (tensor["kl"] is not None) == quantized
        assert (tensor["name"] in out) == quantized
        assert tensor["bytes_after"] == weight.nbytes
    assert report["total"]["bytes_after"] == sum(weight.nbytes for weight in weights.values())


def test_all_zero_tensors_are_named(
    make_dmpt: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_dmpt(tmp_path / "model")
    from training.checkpoints.checkpoint import save_model

    with torch.no_grad():
        model.transformer.h["1"].mlp.c_fc.weight.zero_()
    save_model(model, tmp_path / "zero")
    assert main(["quantize", str(tmp_path / "zero"), str(tmp_path / "out"), "--scheme", "int8"]) == 0
    assert "all-zero tensors: transformer.h.1.mlp.c_fc.weight\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ("--target-size", "1KB"),
            3,
            r"no plan fits 0\.001 MB: with --candidates \S+ the least is 0\.\d+ MB \(\d+\.\d+ bits per weight\)",
        ),
        (("--target-kl", "1e-9"), 3, r"no plan has a KL of 1e-09: the least is"),
        (("--target-size", "many"), 2, "is not a size: give one such as 200MB"),
        (("--target-size", "1MB", "--target-bits", "4"), 2, "give one of"),
        (("--target-size", "1MB", "--scheme", "int4"), 2, "leave out --scheme"),
        (("--target-size", "1MB", "--candidates", "int5"), 2, "unknown scheme 'int5'"),
        (("--target-size", "1MB", "--candidates", "delta-r16"), 3, "none of --candidates delta-r16 can store"),
        (("--target-size", "1MB", "--prefer", "speed"), 2, "--prefer speed needs --target-kl"),
        (("--target-kl", "1", "--prefer", "speed", "--candidates", "int8,int4"), 2, "add it to --candidates"),
        (("--target-kl", "1", "--smooth", "0.5"), 2, "smoothing is for int8-dynamic: add it to --candidates"),
        (("--scheme", "int8", "--prefer", "speed"), 2, "--prefer speed needs --target-kl"),
        (("--candidates", "int4", "--scheme", "int4"), 2, "--candidates need a plan"),
        ((), 2, "give --scheme, or a target"),
        (("--plan", "nowhere.json"), 3, "nowhere.json"),
    ],
)
def test_bad_input(
    quantize: Callable[..., Any], tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    import re

    got, _, err = quantize("out", *options)
    assert (got, bool(re.search(message, err))) == (code, True), err
    assert not (tmp_path / "out").exists()
