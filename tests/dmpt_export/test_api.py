"""The Python interface: the same results as the commands, by names that import nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dmpt_export
from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.perplexity import evaluate, read_text
from dmpt_export.cli.main import main
from training.errors import FieldError, OptionError


@pytest.fixture
def text(sample_text: str, tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text, encoding="utf-8")
    return path


def test_the_way_from_a_checkpoint_to_a_text(tiny_dmpt: Path, text: Path, tmp_path: Path) -> None:
    quantized = dmpt_export.quantize(tiny_dmpt, tmp_path / "small", scheme="int8")
    manifest = dmpt_export.export(tmp_path / "small", tmp_path / "device")
    assert {report.scheme for report in quantized.reports} == {"int8", "float32"}
    assert manifest == json.loads((tmp_path / "device" / "dmpt_manifest.json").read_text())
    found = dmpt_export.evaluate(tmp_path / "device", text)
    scorer = open_scorer(tmp_path / "device")
    assert found.perplexity == evaluate(scorer, read_text(scorer, [text])).perplexity
    comparison = dmpt_export.compare([tmp_path / "device"], text, gen=4, prompt=8, repetitions=1)
    (row,) = comparison.rows
    assert row.quality is not None
    assert row.quality.perplexity == found.perplexity
    with dmpt_export.load(tmp_path / "device") as model:
        assert isinstance(model, dmpt_export.Model)
        assert len(model.generate([5, 6], max_new_tokens=3)) == 3


def test_public_names_import_nothing_until_they_are_used() -> None:
    names = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "click")
    code = f"import sys, dmpt_export\nprint([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[]") or done.stdout.startswith("['numpy']")
    without = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors'): sys.modules[name] = None\n"
        "import dmpt_export\nassert dmpt_export.load and dmpt_export.Model"
    )
    assert subprocess.run([sys.executable, "-c", without], check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = dmpt_export.lod


def test_errors_name_fields(tiny_dmpt: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give scheme, or a target for a plan such as target_size"):
        dmpt_export.quantize(tiny_dmpt, tmp_path / "small")
    dmpt_export.quantize(tiny_dmpt, tmp_path / "small", scheme="int8")
    with pytest.raises(FieldError, match=r"holds an earlier result: .* replace it with overwrite"):
        dmpt_export.quantize(tiny_dmpt, tmp_path / "small", scheme="int4")


# --- one step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [["--scheme", "int4"], ["--scheme", "int8", "--rule", "heads.*=int4:64", "--asymmetric"]]
)
def test_quantizing_on_the_way_gives_what_two_steps_give(more: list[str], tiny_dmpt: Path, tmp_path: Path) -> None:
    small, two, one = (str(tmp_path / name) for name in ("small", "two", "one"))
    assert main(["quantize", str(tiny_dmpt), small, *more]) == 0
    assert main(["onnx", small, two]) == 0
    assert main(["onnx", str(tiny_dmpt), one, *more]) == 0
    first, second = (json.loads(Path(place, "dmpt_manifest.json").read_text()) for place in (two, one))
    names = {"model.onnx", "model.onnx.data", "tokenizer.json", "quantization_report.json"}
    assert {name: second["files"][name] for name in names} == {name: first["files"][name] for name in names}
    assert second["source"] == {**first["source"], "name": tiny_dmpt.name}
    assert second["quantization"] == first["quantization"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rule", "heads.*=int4"], 2, "need --scheme"),
        (["--scheme", "int4-gptq"], 2, "--calib"),
        (["--scheme", "int9"], 2, "'int9' is not one of"),
        (["--calib", "text.txt"], 2, "--calib is for --kv-cache int8"),
    ],
)
def test_what_cannot_be_quantized_on_the_way(
    arguments: list[str], code: int, message: str, tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["onnx", str(tiny_dmpt), str(tmp_path / "out"), *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_run_but_pointed_to_its_export(tiny_dmpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_dmpt), "The tide"]) == 3
    assert f"dmpt-export onnx {tiny_dmpt} DEVICE" in capsys.readouterr().err


# --- nothing is replaced silently -------------------------------------------------------------------

VERBS = {
    "init": ["init", "{gpt2}", "{out}", "--heads", "2", "--splits", "2"],
    "quantize": ["quantize", "{gpt2}", "{out}", "--scheme", "int8"],
    "onnx": ["onnx", "{gpt2}", "{out}"],
    "compare": ["compare", "{device}", "--data", "{text}", "--out", "{out}", "--gen", "4", "--repetitions", "1"],
    "bench": ["bench", "{device}", "--report", "{out}.html", "--gen", "4", "--repetitions", "1", "--loads", "1"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_earlier_result_stays_unless_overwritten(
    verb: str, tiny_gpt2: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["onnx", str(tiny_gpt2), str(tmp_path / "device")]) == 0
    places = {"gpt2": tiny_gpt2, "out": tmp_path / "out", "device": tmp_path / "device", "text": text}
    arguments = [argument.format(**places) for argument in VERBS[verb]]
    result = tmp_path / ("out.html" if verb == "bench" else "out")
    assert main(arguments) == 0
    before = result.stat().st_mtime_ns, result.stat().st_ino
    capsys.readouterr()
    assert main(arguments) == 3
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert (result.stat().st_mtime_ns, result.stat().st_ino) == before
    assert main([*arguments, "--overwrite"]) == 0
    assert (result.stat().st_mtime_ns, result.stat().st_ino) != before
