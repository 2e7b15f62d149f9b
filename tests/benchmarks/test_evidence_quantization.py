"""The evidence on quantization: the figures by hand, one run that is not repeated, peers behind fakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from benchmarks.evidence import quantization
from benchmarks.evidence.quantization_report import figures, table
from benchmarks.peers import registry
from benchmarks.peers.adapters.ort_quantizers import gemm_to_matmul
from benchmarks.peers.registry import Peer
from benchmarks.quality.divergence import Base
from benchmarks.quality.perplexity import evaluate
from dmpt_export.cli.main import main
from quant.schemes import SCHEMES
from tests.helpers.bench_fakes import FakeScorer


def test_figures_by_hand() -> None:
    """Two positions of two tokens: (1/2, 1/2) against (1/4, 3/4), and (1/4, 3/4) against itself."""

    def scorer(*rows: list[float]) -> Any:
        return FakeScorer(lambda _: np.log(np.array(rows, np.float32)), 2, context=3)

    base = Base(scorer([0.5, 0.5], [0.25, 0.75]))
    got = figures(evaluate(scorer([0.25, 0.75], [0.25, 0.75]), np.array([1, 0, 1]), 3, 3, "sliding", base=base))
    kl = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert got["tokens"] == 2
    assert got["same_top"] == 0.5
    assert got["mean_kl"] == pytest.approx(kl / 2, rel=1e-5)
    assert got["kl_p99"] == pytest.approx(0.99 * kl, rel=1e-5)
    assert got["perplexity"] == pytest.approx((0.25 * 0.75) ** -0.5, rel=1e-6)
    assert got["reference_perplexity"] == pytest.approx((0.5 * 0.75) ** -0.5, rel=1e-6)


def test_every_scheme_and_size_has_its_options() -> None:
    found = quantization.variants(Path("c.txt"), ["1MB"], ["smooth=--scheme int8-dynamic --smooth 0.5 --calib CALIB"])
    assert found["float32"] == []
    assert set(SCHEMES) == set(quantization.SCHEMES) < set(found)
    assert found["planned 1MB"] == ["--target-size", "1MB", "--calib", "c.txt"]
    assert found["smooth"] == ["--scheme", "int8-dynamic", "--smooth", "0.5", "--calib", "c.txt"]
    assert all(("--calib" in found[name]) == scheme.calibrated for name, scheme in SCHEMES.items())


def test_the_table_is_by_size_and_peers_come_last() -> None:
    plain = {"tokens": 10, "perplexity": 11.0, "reference_perplexity": 10.0, "mean_kl": 0.1, "kl_p99": 1.0,
             "same_top": 0.5, "model": "m", "text": "t.txt"}  # fmt: skip
    lines = [
        plain | {"name": "peer", "onnx_bytes": 9_000_000, "peer": True},
        plain | {"name": "small", "onnx_bytes": 1_000_000, "peer": False, "weights_bytes": 900_000, "seconds": 3.2},
        plain | {"name": "large", "onnx_bytes": 4_000_000, "peer": False, "mean_kl": -1e-9},
    ]
    text = table(lines, ["x is not measured"])
    assert [row.split("|")[1].strip() for row in text.splitlines()[4:7]] == ["large", "small", "peer"]
    assert "+10.00 %" in text
    assert "-0.0" not in text
    assert text.endswith("\n\nx is not measured\n")


def test_the_whole_command_is_not_done_twice(
    tiny_gpt2: Path, sample_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def cli(_: Any, *arguments: Any) -> None:
        if main(list(map(str, arguments))):
            raise quantization.InputError("refused")

    known = {"fake": Peer("tests.helpers.bench_fakes", ("w4", "broken"), ("numpy",), ""),
             "absent": Peer("no.module", ("int8",), ("no-such-package",), "pip install it")}  # fmt: skip
    monkeypatch.setattr(quantization, "all_peers", lambda: known)
    monkeypatch.setattr(quantization.Evidence, "cli", cli)
    (tmp_path / "text.txt").write_text(sample_text)
    arguments = ["--work", str(tmp_path / "work"), "--model", f"gpt2={tiny_gpt2}", "--calib", "no.txt", "--peers",
                 "--text", str(tmp_path / "text.txt"), "--tokens", "150", "--variants", "float32,int8,bad",
                 "--also", "bad=--scheme int9"]  # fmt: skip
    quantization.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "work" / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["float32", "int8", "fake w4"]
    float_line, int8, fake = lines
    assert abs(float_line["mean_kl"]) < 1e-6 < int8["mean_kl"] < fake["mean_kl"]
    assert float_line["tokens"] == 118
    assert float_line["perplexity"] == pytest.approx(float_line["reference_perplexity"], rel=1e-4)
    assert int8["weights_bytes"] < float_line["weights_bytes"]
    assert fake["onnx_bytes"] == 11
    said = capsys.readouterr().out
    assert "gpt2 bad is not measured" in said
    assert "absent is not measured: it lacks no-such-package" in said
    assert "fake broken is not measured" in said
    assert (tmp_path / "work" / "quantization.md").read_text() in said
    monkeypatch.setattr(quantization, "evaluate", None)  # nothing is measured again
    quantization.main([*arguments[:-4], "--variants", "float32,int8"])
    assert len((tmp_path / "work" / "results.jsonl").read_text().splitlines()) == 3


def test_another_model_text_or_calibration_is_measured_anew(
    tiny_gpt2: Path, tiny_dmpt: Path, sample_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Results depend on the weights, the tokens and the options, not on names."""
    monkeypatch.setattr(quantization.Evidence, "cli", lambda _, *arguments: main(list(map(str, arguments))))
    for name, text in (("text.txt", sample_text), ("calib.txt", sample_text[::-1])):
        (tmp_path / name).write_text(text)
    results, model = tmp_path / "work" / "results.jsonl", tmp_path / "model"

    def lines(source: Path, tokens: int = 150) -> list[dict[str, Any]]:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(source, model)
        quantization.main(["--work", str(tmp_path / "work"), "--model", f"m={model}", "--calib",
                           str(tmp_path / "calib.txt"), "--text", str(tmp_path / "text.txt"), "--tokens", str(tokens),
                           "--variants", "other", "--also", "other=--scheme int8 --calib CALIB"])  # fmt: skip
        return [json.loads(line) for line in results.read_text().splitlines()]

    first = lines(tiny_gpt2)
    assert len(first) == 1
    assert lines(tiny_gpt2) == first
    capsys.readouterr()
    both = lines(tiny_dmpt)
    assert len(both) == 2
    assert both[0]["perplexity"] != both[1]["perplexity"]
    assert f"{both[1]['perplexity']:.3f}" in (said := capsys.readouterr().out)
    assert f"{both[0]['perplexity']:.3f}" not in said  # it belongs to another model
    assert len(lines(tiny_dmpt, 140)) == 3
    (tmp_path / "calib.txt").write_text(sample_text * 2)
    assert len(lines(tiny_dmpt, 140)) == 4
    assert lines(tiny_gpt2) == lines(tiny_dmpt, 140)


def test_the_table_shows_what_was_asked_for_last(
    tiny_gpt2: Path, sample_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Options that were measured before are not measured again, and their results are shown."""
    monkeypatch.setattr(quantization.Evidence, "cli", lambda _, *arguments: main(list(map(str, arguments))))
    (tmp_path / "text.txt").write_text(sample_text)

    def shown(scheme: str) -> str:
        capsys.readouterr()
        quantization.main(["--work", str(tmp_path / "work"), "--model", f"m={tiny_gpt2}", "--calib", "none", "--text",
                           str(tmp_path / "text.txt"), "--tokens", "150", "--variants", "other",
                           "--also", f"other=--scheme {scheme}"])  # fmt: skip
        return capsys.readouterr().out.partition("m: ")[2]

    first, second = shown("int8"), shown("int4")
    assert "| other" in first != second
    assert shown("int8") == first


def test_wrong_options_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--work", str(tmp_path), "--calib", "c", "--text", "t"]
    for option in (["--model", "gpt2"], ["--model", "a=b", "--also", "x"], ["--model", "a=b", "--peer-python", "y"]):
        with pytest.raises(SystemExit) as stopped:
            quantization.main([*needed, *option])
        assert stopped.value.code == 2
    with pytest.raises(SystemExit, match="unknown variants: int9"):
        quantization.main([*needed, "--model", "a=b", "--variants", "int9"])


@pytest.mark.parametrize("turned", [0, 1])
def test_gemms_become_matmul_and_add(turned: int) -> None:
    """As ORT's quantizer wants them, and equal; a Gemm that is more than a product and a sum stays."""
    rng = np.random.default_rng(0)
    matrix, bias = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    stored = np.ascontiguousarray(matrix.T) if turned else matrix
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="g", transB=turned),
             helper.make_node("Gemm", ["y", "v", "b"], ["z"], name="h", alpha=2.0)]  # fmt: skip
    constants = {"w": stored, "b": bias, "v": np.eye(3, dtype=np.float32)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, (2, 4))], [helper.make_tensor_value_info("z", 1, (2, 3))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert gemm_to_matmul(model) == 1
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add", "Gemm"]
    x = rng.normal(size=(2, 4)).astype(np.float32)
    (z,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(z, 2 * (x @ matrix + bias) + bias, rtol=1e-5)


def test_peers_read_a_plain_gpt2_that_the_trainer_wrote(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    from tests.helpers.models import random_model, saved_model

    source = saved_model(tmp_path / "dmpt", [], 1)
    model = GPT2LMHeadModel.from_pretrained(registry.gpt2_folder(source, tmp_path / "gpt2"))
    import torch

    ids = torch.arange(9)[None]
    want = random_model([], 1).log_probs(ids)
    torch.testing.assert_close(model(ids).logits.log_softmax(-1), want, rtol=0, atol=1e-5)
