"""Every number of an export is compared with the checkpoint: no tensor and no row is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dmpt_export.onnx.export as export_module
from dmpt_export.check.float_kernels import initializers, read_graph
from dmpt_export.check.stored_numbers import check_stored
from dmpt_export.cli.main import main
from dmpt_export.inspect.graph_summary import stored_names
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from quant.checkpoint import load_weights, save_quantized
from quant.rules import parse_rule
from tests.helpers.models import random_model
from training.checkpoints.checkpoint import save_model
from training.errors import ValidationError

SCHEMES: dict[str, dict[str, Any]] = {
    "float": {},
    "int8": {"scheme": "int8"},
    "int4 with zero points": {"scheme": "int4:asymmetric"},
    "int8-dynamic": {"scheme": "int8-dynamic"},
    "int8-dynamic everywhere": {"scheme": "int8-dynamic", "vocabulary": "int8-dynamic"},
    "fp16": {"scheme": "fp16"},
    "deltas": {"scheme": "int8", "rules": [parse_rule("heads.*=delta-r16")]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored") / "dual"
    save_model(random_model([2], 8, fast_k=16, n_positions=160), out)
    return out


def stored(source: Path, out: Path, scheme: str) -> Path:
    if not SCHEMES[scheme]:
        return source
    save_quantized(source, out, **SCHEMES[scheme])
    return out


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_tensors_are_compared(source: Path, scheme: str, target: str, tmp_path: Path) -> None:
    if target == "cuda" and scheme.startswith("int8-dynamic"):
        pytest.skip("not for CUDA")
    folder = stored(source, tmp_path / "quantized", scheme)
    export_onnx(folder, tmp_path / "onnx", ExportOptions(target=target), verify=False)
    graph = tmp_path / "onnx" / "model.onnx"
    assert check_stored(graph, folder) > 50_000
    _, weights = load_weights(folder)
    held = {name for tensor in initializers(read_graph(graph).graph) for name in stored_names(tensor.name)}
    assert held == set(weights)


def last_row(weight: Any) -> Any:
    """A changed number in the last row: of a position or a token that the check's tokens do not use."""
    if isinstance(weight, np.ndarray):
        weight = weight.copy()
        weight[-1, 3] += 0.5
        return weight
    scales = weight.scales.copy()
    scales[-1] *= 1.5
    return type(weight)(**{**vars(weight), "scales": scales})


@pytest.mark.parametrize(
    ("scheme", "tensor"),
    [
        ("float", "transformer.wpe.weight"),
        ("int8", "transformer.wpe.weight"),
        ("int8", "heads.3.weight"),
        ("int4 with zero points", "heads.7.weight"),
        ("int4 with zero points", "heads.4.weight"),  # an anchor: its scales are its branch's own
        ("int8", "transformer.wte.weight"),
        ("int8-dynamic everywhere", "heads.3.weight"),  # read on candidates alone
        ("int8-dynamic everywhere", "heads.4.weight"),  # an anchor
        ("int8-dynamic everywhere", "transformer.wte.weight"),
        ("deltas", "transformer.wte.weight"),
    ],
)
def test_a_row_that_no_token_meets_must_be_right_too(
    source: Path, scheme: str, tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(source, tmp_path / "quantized", scheme)
    plant(tensor, monkeypatch)
    export_onnx(folder, tmp_path / "onnx", verify=False)
    last = 159 if "wpe" in tensor else 96
    with pytest.raises(ValidationError, match=rf"{tensor} differs from the checkpoint, first at row {last}"):
        check_stored(tmp_path / "onnx" / "model.onnx", folder)


def test_an_export_with_wrong_positions_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check's tokens end at position 95."""
    plant("transformer.wpe.weight", monkeypatch)
    assert main(["onnx", str(source), str(tmp_path / "onnx")]) == 4
    assert "transformer.wpe.weight differs from the checkpoint, first at row 159" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def plant(tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path) -> Any:
        config, weights = load_weights(path)
        return config, {**weights, tensor: last_row(weights[tensor])}

    monkeypatch.setattr(export_module, "load_weights", damaged)
