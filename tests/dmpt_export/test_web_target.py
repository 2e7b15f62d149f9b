"""`onnx --target web`: what browsers run fast, unless something else is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from dmpt_export.check.float_kernels import graphs, read_graph
from dmpt_export.cli.main import main


def exported(source: Path, out: Path, *options: str) -> dict[str, Any]:
    assert main(["onnx", str(source), str(out), "--target", "web", "--no-verify", *options]) == 0
    manifest: dict[str, Any] = json.loads((out / "dmpt_manifest.json").read_text(encoding="utf-8"))
    return manifest


def schemes(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: stored["scheme"] for name, stored in manifest["quantization"]["tensors"].items()}


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_dmpt", "tiny_quad"])
def test_every_matrix_gets_int8_dynamic(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    source: Path = request.getfixturevalue(kind)
    manifest = exported(source, tmp_path / "web")
    assert manifest["target"] == "web"
    found = schemes(manifest)
    assert set(found.values()) == {"int8-dynamic"}
    assert "transformer.wte.weight" in found
    assert "unpacks" not in capsys.readouterr().err
    assert schemes(exported(source, tmp_path / "asked", "--scheme", "int8-dynamic")) == found


def test_what_is_asked_for_comes_first(tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = schemes(exported(tiny_dmpt, tmp_path / "rule", "--scheme", "int8-dynamic", "--rule", "*.mlp.*=fp16"))
    assert {scheme for name, scheme in found.items() if ".mlp." in name} == {"fp16"}
    assert {scheme for name, scheme in found.items() if ".mlp." not in name} == {"int8-dynamic"}
    assert "unpacks" not in capsys.readouterr().err
    found = schemes(exported(tiny_dmpt, tmp_path / "vocabulary", "--scheme", "int8-dynamic", "--vocab-scheme", "fp16"))
    assert found["transformer.wte.weight"] == "fp16"
    found = schemes(exported(tiny_dmpt, tmp_path / "int4", "--scheme", "int4"))
    assert set(found.values()) == {"int4"}
    assert "note: WebAssembly unpacks int4 weights at every token" in capsys.readouterr().err


def test_a_quantized_checkpoint_stays_as_it_was_stored(
    tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_dmpt), str(tmp_path / "int8"), "--scheme", "int8"]) == 0
    assert set(schemes(exported(tmp_path / "int8", tmp_path / "web")).values()) == {"int8"}
    assert "WebAssembly unpacks int8" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_python_runs_it_as_any_other_export(cache: str, tiny_dmpt: Path, tmp_path: Path) -> None:
    options = ("--scheme", "fp16", "--kv-cache", cache)
    exported(tiny_dmpt, tmp_path / "web", *options)
    assert main(["onnx", str(tiny_dmpt), str(tmp_path / "cpu"), "--no-verify", *options]) == 0
    ids = np.random.default_rng(1).integers(0, 90, 40).tolist()
    outcomes = []
    for name in ("web", "cpu"):
        with runtime.load(tmp_path / name, threads=1) as model:
            sequence = model.sequence()
            steps = [sequence.feed(ids[:30], last=30)[0], *(sequence.feed([token])[0] for token in ids[30:])]
            outcomes.append(np.concatenate(steps))
    np.testing.assert_allclose(*outcomes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["native", "standard"])
def test_no_attention_is_tiled(layout: str, tiny_quad: Path, tmp_path: Path) -> None:
    """In WebAssembly tiles of many rows take eight times as long; the kernel that gives its probabilities has none."""
    manifest = exported(tiny_quad, tmp_path / "web", "--layout", layout)
    assert manifest["requires"]["onnxruntime"] == "1.23"
    name = "model.onnx"
    nodes = [node for part in graphs(read_graph(tmp_path / "web" / name).graph) for node in part.node]
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert attentions
    for node in attentions:
        assert {attribute.name: attribute.i for attribute in node.attribute}["qk_output"] == 2
        assert len(node.output) == 4
        assert node.output[3]  # without a name the kernel would not make it, and could tile


def test_text_for_the_caches_does_not_calibrate_weights(
    tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is for the caches alone when nobody asked to quantize."""
    text = tmp_path / "text.txt"
    text.write_text("The tide mill stands at the mouth of the river. " * 60)
    exported(tiny_dmpt, tmp_path / "device", "--kv-cache", "int8", "--calib", str(text))
    assert "calibration text changes no weight" not in capsys.readouterr().err
    report = json.loads((tmp_path / "device" / "quantization_report.json").read_text(encoding="utf-8"))
    exported(tiny_dmpt, tmp_path / "without", "--kv-cache", "int8")
    assert report == json.loads((tmp_path / "without" / "quantization_report.json").read_text(encoding="utf-8"))
