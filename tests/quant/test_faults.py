"""Edited, damaged or confused files: cached damages, plans, targets, calibration texts; numbers that are not finite."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmpt_export.cli.main import main
from quant.calibration import Calibration, Inputs
from quant.deltas import quantize_group
from quant.planning import damage_table
from quant.planning.plan import Plan, Target
from quant.planning.planned import save_planned
from quant.quantize import quantize_tensor
from quant.rules import parse_rule
from quant.schemes.gptq import gptq
from tests.helpers.models import random_calibration
from training.checkpoints.checkpoint import load_model, save_model
from training.errors import InputError

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def quantize(tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """quantize(OUT, *options) runs the verb on the tiny DMPT and returns (exit code, stderr)."""

    def run(out: str, *options: str | Path) -> tuple[int, str]:
        places = [str(tiny_dmpt), str(tmp_path / out), "--cache-dir", str(tmp_path / "cache")]
        code = main(["quantize", *places, *map(str, options)])
        return code, capsys.readouterr().err

    return run


# --- cached damages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remembered(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration, Plan]:
    """A cache of damages, and the text and the plan that it came from. Read-only."""
    cache, calibration = tmp_path_factory.mktemp("damages"), random_calibration(tiny_dmpt)
    plan, _ = save_planned(tiny_dmpt, None, Target(bits=7), calibration, cache, "int8,int4")
    return cache, calibration, plan


def edited(change: Edit) -> Callable[[Path], Any]:
    def edit(file: Path) -> None:
        known = json.loads(file.read_text())
        change(known)
        file.write_text(json.dumps(known))

    return edit


def every(**values: Any) -> Callable[[Path], Any]:
    return edited(lambda known: [option.update(values) for option in known.values()])


UNSOUND: dict[str, Callable[[Path], Any]] = {
    "not a number": every(kl=math.nan),
    "infinite": every(kl=math.inf),
    "negative": every(kl=-0.5),
    "text": every(kl="0.1"),
    "no damage": edited(lambda known: [option.pop("kl") for option in known.values()]),
    "more than there is": every(size=5),
    "no bytes": every(bytes=0),
    "half a byte": every(bytes=0.5),
    "another scheme": every(scheme="int4"),
    "no object": edited(lambda known: known.update(dict.fromkeys(known, 3))),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "a list": lambda file: file.write_text("[1]"),
}


@pytest.mark.parametrize("fault", UNSOUND)
def test_damages_that_cannot_be_are_measured_again(
    fault: str, remembered: tuple[Path, Calibration, Plan], tiny_dmpt: Path, tmp_path: Path
) -> None:
    cache, calibration, plan = remembered
    shutil.copytree(cache, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    UNSOUND[fault](file)
    again, _ = save_planned(tiny_dmpt, None, Target(bits=7), calibration, tmp_path / "cache", "int8,int4")
    assert again == plan
    (sound,) = cache.iterdir()
    assert json.loads(file.read_text()) == json.loads(sound.read_text()), "the file stays damaged"


def test_sizes_that_are_not_those_of_the_tensors_are_refused(
    remembered: tuple[Path, Calibration, Plan], tiny_dmpt: Path, tmp_path: Path
) -> None:
    cache, calibration, _ = remembered
    shutil.copytree(cache, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    edited(lambda known: [option.update(bytes=option["bytes"] - 1) for option in known.values()])(file)
    with pytest.raises(InputError, match=rf"{file.name} belong to different tensors: delete"):
        save_planned(tiny_dmpt, tmp_path / "out", Target(bits=7), calibration, tmp_path / "cache", "int8,int4")
    assert not (tmp_path / "out").exists()


def test_damage_is_never_below_nothing(tiny_dmpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding makes the KL of two equal distributions a little more or less than 0."""
    model = load_model(tiny_dmpt)
    damage = damage_table.damage_on(model, random_calibration(tiny_dmpt))
    damage.want = damage.want - 1e-3
    assert damage.of({}) == 0


# --- targets and candidates ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--target-kl", "--target-bits"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "much"])
def test_a_target_is_a_number_above_0(option: str, value: str, quantize: Callable[..., tuple[int, str]]) -> None:
    code, err = quantize("out", option, value, "--calib", "absent.txt")
    assert code == 2
    assert f"Invalid value for '{option}'" in err
    assert value.lstrip("-") in err


@pytest.mark.parametrize("value", ["int8,", ",int8", "int8,,int4", " ", ""])
def test_an_empty_candidate_is_wrong_usage(value: str, quantize: Callable[..., tuple[int, str]]) -> None:
    code, err = quantize("out", "--target-bits", "7", "--calib", "absent.txt", "--candidates", value)
    assert code == 2
    assert f"--candidates '{value}' has an empty part" in err


def test_candidates_in_bits_are_the_schemes_that_rules_in_bits_are(
    quantize: Callable[..., tuple[int, str]], text: Path, tmp_path: Path
) -> None:
    options = ("--target-bits", "7", "--calib", text, "--calib-tokens", 128)
    assert quantize("bits", *options, "--candidates", "8, 4:32,int8")[0] == 0
    assert quantize("names", *options, "--candidates", "int8,int4-gptq:32")[0] == 0
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("bits", "names")]
    assert plans[0] == plans[1]
    assert {rule.partition("=")[2] for rule in plans[0]["rules"]} == {"int8", "int4-gptq:32"}


# --- plans and their texts ------------------------------------------------------------------------------


def test_a_plan_of_another_model_is_refused(quantize: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """A GPT-2's plan matches the trunk of a DMPT, and has no rule for its paths."""
    (tmp_path / "plan.json").write_text(json.dumps({"rules": ["transformer.h.*=int8", "transformer.wte=int4"]}))
    code, err = quantize("out", "--plan", tmp_path / "plan.json")
    assert code == 3
    assert err.count("\n") == 1
    assert "the plan has no rule for heads.1.weight, " in err
    assert "paths.left.h.2.attn.c_proj.weight and more" in err
    assert not (tmp_path / "out").exists()
    assert quantize("out", "--plan", tmp_path / "plan.json", "--scheme", "int8")[0] == 0
    # but tensors with an explicit float32 rule stay float32
    (tmp_path / "plan.json").write_text(json.dumps({"rules": ["heads.*=float32", "*=int8"]}))
    (tmp_path / "kept.json").write_text(json.dumps({"rules": ["heads.*=float32", "transformer.h.*=int8"]}))
    assert quantize("kept", "--plan", tmp_path / "kept.json")[0] == 0


def test_a_replay_asks_for_the_text_of_its_plan(
    quantize: Callable[..., tuple[int, str]], text: Path, tmp_path: Path
) -> None:
    calib = ("--calib", text, "--calib-tokens", 128)
    assert quantize("planned", "--target-bits", "7", "--candidates", "int8,int4-gptq", *calib)[0] == 0
    plan = tmp_path / "planned" / "plan.json"
    told = json.loads(plan.read_text())["calibration"]
    made = f"{plan} was made with 128 tokens of a text with sha256 {told['sha256'][:12]}..."
    code, err = quantize("missing", "--plan", plan)
    assert (code, err) == (3, f"Error: {made}, and int4-gptq needs it: give the same text with --calib\n")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "!", encoding="utf-8")
    for different in (("--calib", other, "--calib-tokens", 128), ("--calib", text, "--calib-tokens", 192)):
        code, err = quantize(f"other-{different[-1]}", "--plan", plan, *different)
        assert code == 0
        assert f"warning: {made}, not with these {different[-1]} of " in err
    code, err = quantize("same", "--plan", plan, *calib)
    assert code == 0
    assert "made with" not in err
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("planned", "same", "other-192")]
    assert files[0] == files[1] != files[2]
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "calibration": {"sha256": 5}}))
    code, err = quantize("broken", "--plan", plan, *calib)
    assert code == 3
    assert "calibration must give sha256 and tokens" in err


def test_a_plan_that_goes_by_no_text_needs_none(
    quantize: Callable[..., tuple[int, str]], text: Path, tmp_path: Path
) -> None:
    calib = ("--calib", text, "--calib-tokens", 128)
    assert quantize("planned", "--target-bits", "7", "--candidates", "int8,int4", *calib)[0] == 0
    code, err = quantize("replayed", "--plan", tmp_path / "planned" / "plan.json")
    assert code == 0
    assert "made with" not in err
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("planned", "replayed")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "used"),
    [
        (("--scheme", "int4"), False),
        (("--scheme", "int8", "--rule", "heads.1=int4"), False),
        (("--scheme", "int8-dynamic"), False),
        (("--scheme", "int8-dynamic", "--smooth", "0.5"), True),
        (("--scheme", "int4-gptq"), True),
        (("--scheme", "int8", "--rule", "heads.1=4"), True),  # a number of bits, beside a text: GPTQ's
    ],
)
def test_a_text_that_decides_nothing_is_said(
    options: tuple[str, ...], used: bool, quantize: Callable[..., tuple[int, str]], text: Path
) -> None:
    code, err = quantize("out", *options, "--calib", text, "--calib-tokens", 64)
    lines = [line for line in err.splitlines() if "text changes no weight" in line]
    assert code == 0, err
    assert len(lines) == (0 if used else 1), err
    assert "text changes no weight" not in quantize("out", "--scheme", "int4")[1]


# --- numbers that are not finite ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["int8", "int8:asymmetric", "int4", "int4:asymmetric", "int4-hqq", "int4-gptq", "int2"]
)
def test_weights_too_large_for_their_scales_are_named(scheme: str) -> None:
    array = np.full((4, 32), 3e38, np.float32)
    array[:, ::2] *= -1
    with pytest.raises(InputError, match=r"^tensor 'heads\.3\.weight': its weights are too large for scales"):
        quantize_tensor("heads.3.weight", array, parse_rule(f"*={scheme}"))


def test_deltas_too_large_are_named() -> None:
    anchor, head = np.zeros((40, 32), np.float32), np.full((40, 32), 3e38, np.float32)
    with pytest.raises(InputError, match=r"^heads\.1\.weight: the deltas are too large to square"):
        quantize_group({"heads.1.weight": head}, "heads.0.weight", anchor, parse_rule("*=delta-r16"))


MOMENTS = {"not a number": np.full((32, 32), np.nan), "infinite": np.full((32, 32), np.inf), "negative": -np.eye(32)}


@pytest.mark.parametrize("kind", MOMENTS)
def test_inputs_that_gptq_cannot_use_are_told(kind: str) -> None:
    inputs = Inputs(5, MOMENTS[kind], np.ones(32, np.float32))
    with pytest.raises(InputError, match="its inputs on the calibration text are not finite"):
        gptq(np.ones((2, 32), np.float32), 4, 32, True, inputs)


def test_inputs_too_large_to_square_are_one_line(
    make_dmpt: Callable[..., Any], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_dmpt(tmp_path / "model")
    with torch.no_grad():
        model.transformer.h["1"].ln_2.weight *= 1e25
    save_model(model, tmp_path / "large", tokenizer_from=tmp_path / "model")
    options = ["--scheme", "int4-gptq", "--calib", str(text), "--calib-tokens", "64"]
    assert main(["quantize", str(tmp_path / "large"), str(tmp_path / "out"), *options]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("Error: tensor 'transformer.h.1.mlp.c_fc.weight': its inputs on the calibration text are no")
    assert not (tmp_path / "out").exists()
