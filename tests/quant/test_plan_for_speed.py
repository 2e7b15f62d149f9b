"""A plan that chooses int8-dynamic where it is safe: its damage is that of the kernels, and planted outliers show."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import load_weights, save_quantized
from quant.forms.weights import form_of
from quant.planning.activations import rounded
from quant.planning.damage import Damage
from quant.planning.groups import FAST_CANDIDATES, Group, groups_of
from quant.planning.plan import Option, Target, make_plan
from quant.planning.planned import save_planned
from quant.quantize import quantize_tensor
from quant.rules import DYNAMIC, parse_rule
from quant.schemes import SCHEMES
from tests.helpers.graphs import rounding, run
from tests.helpers.models import random_calibration, saved_model
from training.checkpoints.checkpoint import load_model, load_state, save_model


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_activations_are_rounded_as_the_kernel_rounds_them(shift: float) -> None:
    rng = np.random.default_rng(4)
    texts = (rng.normal(shift, 1, (3, 5, 48)) * [[[1]], [[40]], [[0]]]).astype(np.float32)
    tensor = SCHEMES["int8-dynamic"](rng.normal(size=(7, 48)).astype(np.float32))
    matrix = tensor.dequantize()
    got = rounded(torch.from_numpy(texts)).numpy()
    for text, row in zip(texts, got, strict=True):
        kernel = run("DynamicQuantizeMatMul", text, [tensor.packed.T, tensor.scales, None])
        assert (np.abs(row.astype(np.float64) @ matrix.T - kernel) <= rounding(row, matrix)).all()


@pytest.mark.parametrize(("group", "tied"), [("transformer.h.0.mlp.*", True), ("heads.*", False), ("heads.0", True)])
@pytest.mark.parametrize("splits", [[], [1]])
def test_the_damage_is_that_of_the_exported_kernels(splits: list[int], group: str, tied: bool, tmp_path: Path) -> None:
    """The same text through ONNX Runtime's kernels in one run, float weights elsewhere."""
    source = saved_model(tmp_path / "source", splits, 2 ** len(splits), tie_word_embeddings=tied)
    windows = random_calibration(source).windows[:1]
    _, arrays = load_state(source)
    names = [name for name in arrays if fnmatch(name, f"{group.removesuffix('.*')}.*weight")]
    if group == "heads.0":
        names = ["transformer.wte.weight"]
    forms = {name: quantize_tensor(name, arrays[name], parse_rule(f"*={DYNAMIC}"))[0] for name in names}
    model = load_model(source)
    predicted = Damage(model, windows).of(forms)
    save_quantized(source, tmp_path / "quantized", None, [parse_rule(f"{group}={DYNAMIC}"), parse_rule("*=float32")])
    export_onnx(tmp_path / "quantized", tmp_path / "onnx")
    with torch.inference_mode():
        want = model.log_probs(windows)[0].double().numpy()
    with runtime.load(tmp_path / "onnx", threads=1) as loaded:
        got, _ = loaded.sequence().feed(windows[0].numpy(), last=windows.shape[1])
    kernels = float((np.exp(want) * (want - got)).sum(-1).mean())
    assert predicted == pytest.approx(kernels, rel=0.02)
    weights_alone = Damage(model, windows).of({name: _float(form) for name, form in forms.items()})
    assert predicted > 1.1 * weights_alone  # or the test could not tell whether activations are rounded


def _float(form: Any) -> Any:
    return form_of(form.dequantize())


@pytest.fixture
def with_outliers(tiny_dmpt: Path, tmp_path: Path) -> Path:
    """A model with one channel of one norm 1,000 times as large, and the weights that read it as much smaller."""
    model = load_model(tiny_dmpt)
    with torch.no_grad():
        block = model.transformer.h["1"]
        block.ln_2.weight[3] *= 1000
        block.ln_2.bias[3] *= 1000
        block.mlp.c_fc.weight[3] /= 1000
    save_model(model, tmp_path / "outliers", tiny_dmpt)
    return tmp_path / "outliers"


def chosen(folder: Path) -> set[str]:
    """The groups that are stored as int8-dynamic."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return {rule.removesuffix(f"={DYNAMIC}") for rule in plan["rules"] if rule.endswith(f"={DYNAMIC}")}


def test_the_plan_notices_outliers_and_smoothing_undoes_them(
    with_outliers: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calib", str(text), "--calib-tokens", "256", "--cache-dir", str(tmp_path / "cache")]
    plan = ["--target-kl", "0.05", "--prefer", "speed"]
    shapes = {name: array.shape for name, array in load_state(with_outliers)[1].items()}
    outlier, linear = "transformer.h.1.mlp.*", sum(".h." in str(group) for group in groups_of(shapes, {}))
    assert main(["quantize", str(with_outliers), str(tmp_path / "plain"), *options, *plan]) == 0
    assert len(chosen(tmp_path / "plain")) == linear - 1
    assert outlier not in chosen(tmp_path / "plain")
    smooth = ["--smooth", "0.5"]
    assert main(["quantize", str(with_outliers), str(tmp_path / "smooth"), *options, *plan, *smooth]) == 0
    assert outlier in chosen(tmp_path / "smooth")
    assert len(chosen(tmp_path / "smooth")) == linear
    strict = ["--target-kl", "0.012", "--prefer", "speed"]  # int8 layers are balanced as well
    assert main(["quantize", str(with_outliers), str(tmp_path / "mixed"), *options, *strict, *smooth]) == 0
    assert 0 < len(chosen(tmp_path / "mixed")) < linear
    # The plan alone gives the same weights again: it knows how much it smoothed.
    for name in ("smooth", "mixed"):
        again = ["--plan", str(tmp_path / name / "plan.json")]
        assert main(["quantize", str(with_outliers), str(tmp_path / f"{name} again"), *options, *again]) == 0
        first, second = (load_weights(tmp_path / folder)[1] for folder in (name, f"{name} again"))
        assert all(np.array_equal(form_of(first[n]).dequantize(), form_of(second[n]).dequantize()) for n in first)
    capsys.readouterr()
    assert main(["quantize", str(with_outliers), str(tmp_path / "not"), *again]) == 3
    assert "smoothing needs it: give the same text with --calib" in capsys.readouterr().err


def test_a_plan_for_speed_takes_the_slowest_first() -> None:
    """Least bytes in other schemes, within the divergence, whatever the whole size."""
    groups = [Group((f"*.h.{i}.mlp.*",), (f"w{i}",), size) for i, size in enumerate((100, 300, 200))]
    options = [
        [Option("int8", g.weights, 0.001), Option(DYNAMIC, g.weights + 8, kl)]
        for g, kl in zip(groups, (0.01, 0.03, 0.03), strict=True)
    ]
    parts = [[option.kl for option in group] for group in options]

    def joint(choice: list[int]) -> float:
        return sum(part[i] for part, i in zip(parts, choice, strict=True))

    for kl, expected in ((0.0031, [0, 0, 0]), (0.02, [1, 0, 0]), (0.05, [1, 1, 0]), (0.07, [1, 1, 1])):
        plan = make_plan(groups, options, Target(kl=kl, fast=True), (0, 600, 0), joint)
        assert (plan.chosen, plan.measured_kl <= kl) == (expected, True)


def test_a_planned_mixture_is_exported_and_checked(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [2], 4, fast_k=9)
    calibration = random_calibration(source)
    target = Target(kl=0.05, fast=True)
    plan, _ = save_planned(source, tmp_path / "out", target, calibration, tmp_path / "cache", FAST_CANDIDATES)
    assert {*plan.schemes()} == {"int8", DYNAMIC}
    assert plan.measured_kl <= 0.05
    export_onnx(tmp_path / "out", tmp_path / "onnx")
    with runtime.load(tmp_path / "onnx", threads=1) as model:
        assert model.manifest.rounds_rows_together


@pytest.mark.parametrize("with_drafts", [False, True])
@pytest.mark.parametrize("how", [["--scheme", DYNAMIC], ["--target-kl", "10", "--prefer", "speed"]])
def test_draft_heads_that_become_useless_are_noted(
    how: list[str], with_drafts: bool, tiny_gpt2: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, drafts = [str(tiny_gpt2), str(tmp_path / "source")], ["--next-tokens", "1"]
    assert main(["init", *source, "--splits", "2", *(drafts if with_drafts else [])]) == 0
    options = ["--calib", str(text), "--calib-tokens", "128", "--cache-dir", str(tmp_path / "cache")]
    assert main(["quantize", source[1], str(tmp_path / "out"), *options, *how]) == 0
    assert ("run` refuses --speculate" in capsys.readouterr().err) == with_drafts


def test_a_plan_may_round_the_vocabulary_where_nothing_else_is_fast(
    tiny_dmpt: Path, text: Path, tmp_path: Path
) -> None:
    """With int8 among the candidates, vocabulary matrices get that: a processor reads it as fast."""
    options = ["--calib", str(text), "--calib-tokens", "256", "--cache-dir", str(tmp_path / "cache")]
    for candidates, vocabulary in (("int8-dynamic,fp16", "int8-dynamic"), ("int8-dynamic,int8", "int8")):
        out = tmp_path / vocabulary
        line = ["quantize", str(tiny_dmpt), str(out), *options, "--target-kl", "10", "--prefer", "speed"]
        assert main([*line, "--candidates", candidates]) == 0
        rules = json.loads((out / "plan.json").read_text(encoding="utf-8"))["rules"]
        assert {rule.partition("=")[2] for rule in rules if rule.startswith("heads.")} == {vocabulary}
        assert {rule.partition("=")[2] for rule in rules if ".h." in rule} == {"int8-dynamic"}
