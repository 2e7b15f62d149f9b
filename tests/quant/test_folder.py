"""Records of a quantized folder, edited by hand: bits, deltas that do not agree, null."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.scorer import kind_of
from dmpt_export.cli.main import main
from dmpt_export.onnx.manifest import fingerprint
from quant.checkpoint import load_weights, save_quantized
from quant.folder import wrong_with
from quant.rules import parse_rule
from quant.schemes import SCHEMES
from quant.schemes.low_rank import DELTAS
from tests.helpers.models import saved_model
from training.checkpoints.checkpoint import load_model, load_state, save_model


@pytest.mark.parametrize("scheme", [*SCHEMES, *DELTAS])
def test_bits_are_those_of_the_scheme(scheme: str) -> None:
    entry = {"scheme": scheme, "block": 32, "shape": [40, 32], "transposed": False}
    fit = [bits for bits in range(1, 33) if wrong_with("heads.1.weight", {**entry, "bits": bits}) is None]
    stored = {"int3": 4, "int3-gptq": 4}.get(
        scheme, 4 if scheme in DELTAS else SCHEMES.get(scheme, SCHEMES["int8"]).bits
    )
    assert fit == [stored]


@pytest.fixture(scope="module")
def with_deltas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual model with three heads a leaf, two of each stored as deltas. Read-only."""
    out = tmp_path_factory.mktemp("deltas")
    source = saved_model(out / "source", [2], 6)
    save_quantized(source, out / "quantized", "int8", rules=[parse_rule("heads.*=delta-r16")])
    return out / "quantized"


def heads(*numbers: int) -> list[str]:
    return [f"heads.{j}.weight" for j in numbers]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({4: {"sharers": heads(1, 4)}}, r"heads.4.weight and heads.1.weight share a factor but differ in anchor, shar"),
        (
            {1: {"sharers": heads(1, 4)}, 4: {"sharers": heads(1, 4)}},
            r"heads.1.weight and heads.4.weight share a factor but differ in anchor:",
        ),
        ({2: {"scheme": "delta-r32"}}, r"heads.1.weight and heads.2.weight share a factor but differ in scheme:"),
        ({2: {"block": 32}}, r"heads.1.weight and heads.2.weight share a factor but differ in block:"),
        ({2: {"shape": [96, 32]}}, r"heads.1.weight and heads.2.weight share a factor but differ in shape:"),
        ({2: {"sharers": heads(2, 1)}}, r"heads.1.weight and heads.2.weight share a factor but differ in sharers:"),
        ({1: {"sharers": heads(1, 1, 2)}}, r"heads.1.weight names heads.1.weight twice among its sharers"),
        ({1: {"sharers": heads(1, 3)}}, r"heads.1.weight is not among its sharers"),  # an anchor is not a sharer
        ({2: {"anchor": "heads.1.weight"}}, r"heads.1.weight and heads.2.weight share a factor but differ in anchor:"),
        (
            {1: {"anchor": "heads.2.weight"}},
            r"heads.1.weight is a delta to 'heads.2.weight', which is not a stored mat",
        ),
        (
            {1: {"anchor": "heads.9.weight"}},
            r"heads.1.weight is a delta to 'heads.9.weight', which is not a stored mat",
        ),
        (
            {4: {"anchor": "heads.0.weight"}, 5: {"anchor": "heads.0.weight"}},
            r"heads.4.weight is a delta to heads.0.weight, which is not the anchor of its leaf",
        ),
    ],
)
def test_deltas_that_do_not_agree_are_refused_in_one_line(
    changes: dict[int, dict[str, Any]],
    message: str,
    with_deltas: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(with_deltas, tmp_path / "edited")
    file = tmp_path / "edited" / "config.json"
    config = json.loads(file.read_text())
    for j, change in changes.items():
        config["quantization"]["tensors"][f"heads.{j}.weight"] |= change
    file.write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "edited")]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert re.search(message, err), err


def test_null_says_that_nothing_is_quantized(tiny_dmpt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dmpt, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": None}))
    assert kind_of(folder) == "float"
    assert open_scorer(folder).scheme == "fp32"
    loaded, weights = load_weights(folder)
    expected, arrays = load_state(tiny_dmpt)
    assert loaded.to_dict() == expected.to_dict()
    assert fingerprint(loaded, weights) == fingerprint(expected, arrays)
    save_quantized(folder, tmp_path / "quantized", "int8")
    load_weights(tmp_path / "quantized")
    save_model(load_model(folder), folder)  # a checkpoint may be replaced by a checkpoint
    assert "quantization" not in json.loads((folder / "config.json").read_text())
