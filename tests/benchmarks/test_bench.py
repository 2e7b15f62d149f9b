"""`eval`, `bench` and `compare` as a user types them, on checkpoints and exported folders."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from dmpt_export.cli.bench import node_table
from dmpt_export.cli.main import main
from tests.helpers.cli import TRAINING, run_without
from tests.helpers.tolerances import TOLERANCE


@pytest.fixture(scope="module")
def exported(tiny_gpt2: Path, tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """ONNX folders of the tiny models."""
    from dmpt_export.onnx.export import export_onnx

    out = tmp_path_factory.mktemp("exported")
    for name, source in {"gpt2": tiny_gpt2, "dmpt": tiny_dmpt}.items():
        export_onnx(source, out / name, verify=False)
    return {name: str(out / name) for name in ("gpt2", "dmpt")}


@pytest.fixture
def text(sample_text: str, tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(sample_text, encoding="utf-8")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Standard output of a command that must end with `code`; a failure is one line on standard error."""
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    if code:
        assert out == ""
    if code == 3:
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err
    return err if code else out


def test_eval_prints_one_object(tiny_dmpt: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "eval", str(tiny_dmpt), "--data", text, "--json"))
    assert {"tokens_scored", "perplexity", "accuracy", "sum_log_prob"} <= found.keys()
    assert found["tokens_scored"] == found["tokens"] - 32


def test_eval_takes_fast_k(tiny_dmpt: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def loss(*more: str) -> float:
        found = json.loads(run(capsys, "eval", str(tiny_dmpt), "--data", text, "--json", *more))
        return float(found["mean_nll"])

    assert loss() == loss("--fast-k", "16")
    assert loss("--fast-k", "300") == pytest.approx(loss("--fast-k", "0"), abs=TOLERANCE["float32", "float"])
    assert abs(loss("--fast-k", "2") - loss("--fast-k", "0")) > 1e-4


def test_an_exported_model_scores_as_its_checkpoint(
    tiny_dmpt: Path, exported: dict[str, str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch, onnx = (
        json.loads(run(capsys, "eval", model, "--data", text, "--max-length", "48", "--stride", "16", "--json"))
        for model in (str(tiny_dmpt), exported["dmpt"])
    )
    assert onnx["mean_nll"] == pytest.approx(torch["mean_nll"], abs=TOLERANCE["float32", "float"])
    for key in ("tokens_scored", "accuracy", "route_shares", "tokens_sha256"):
        assert onnx[key] == torch[key]
    assert 0 < onnx["route_shares"]["left"] < 1
    for leaf, shares in torch["head_shares"].items():
        assert len(shares) > 1
        assert onnx["head_shares"][leaf] == pytest.approx(shares, abs=TOLERANCE["float32", "float"])


def test_eval_of_an_exported_model_imports_no_torch(exported: dict[str, str], text: str) -> None:
    done = run_without(TRAINING, "eval", exported["dmpt"], "--data", text)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "routes" in done.stdout


def test_bench_of_one_model(exported: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--threads", "1", "--repetitions", "2", "--loads", "1", "--gen", "8", "--json")
    found = json.loads(run(capsys, "bench", exported["dmpt"], *options))
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "load_s"):
        assert 0 < found[f"{key}_min"] <= found[key] <= found[f"{key}_max"]
    assert found["threads"] == 1
    assert (found["prompt_tokens"], found["generated_tokens"]) == (56, 8)  # the prompt shrank to the context
    folder = Path(exported["dmpt"])
    assert found["size_bytes"] == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert 10_000_000 < found["peak_rss_bytes"] < 500_000_000
    assert found["peak_rss_bytes_min"] == found["peak_rss_bytes"] == found["peak_rss_bytes_max"]
    assert found["switches"] > 0


def test_bench_of_several_models(exported: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    models = [f"one={exported['gpt2']}", exported["dmpt"]]
    options = ("--threads", "1", "--repetitions", "1", "--loads", "1", "--prompt", "16", "--gen", "4")
    found = json.loads(run(capsys, "bench", *models, *options, "--json"))
    assert [m["name"] for m in found["models"]] == ["one", "dmpt"]
    assert found["models"][0]["tests"][0]["ratio"] == 1
    assert found["models"][1]["tests"][1]["ratio"] > 0
    table = run(capsys, "bench", models[0], *options)
    assert "load cold" in table
    assert "pp16" in table
    assert "tg4 @ d16" in table
    assert "±" in table
    assert "GB/s on 1" in table
    assert "ratio" not in table


def test_bench_of_several_threads_with_profile_and_curves(
    exported: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, stored = tmp_path / "bench.html", tmp_path / "bench.json"
    options = ("-t", "1,2", "-r", "1", "--loads", "1", "-p", "8", "-n", "4", "-d", "8,40", "--profile")
    models = (exported["gpt2"], exported["dmpt"])
    said = run(capsys, "bench", *models, *options, "--report", str(report), "--json")
    rows = json.loads(said)["models"]
    assert [(r["name"], r["threads"]) for r in rows] == [("gpt2", 1), ("dmpt", 1), ("gpt2", 2), ("dmpt", 2)]
    assert all(row["cold_load_s"] > 0 and row["touched_bytes"] > 0 for row in rows)
    assert rows[0]["shape"] == {"paths": 1, "heads": 1, "fast_k": 0}
    assert rows[1]["shape"]["paths"] == 2
    assert rows[1]["node_ms"]["If"] > 0
    assert "If" not in rows[0]["node_ms"]
    assert rows[0]["node_ms"]["GroupQueryAttention"] > 0
    text = report.read_text()
    assert "Decode time against tokens of context" in text
    assert "Decode time against threads" in text
    stored.write_text(said)
    out = tmp_path / "out"
    quick = ("--repetitions", "1", "--prompt", "8", "--gen", "4", "--threads", "1")
    run(capsys, "compare", exported["gpt2"], *quick, "--growth", str(stored), "--out", str(out))
    assert "Decode time against threads" in (out / "report.html").read_text()
    assert "| GroupQueryAttention" in node_table({row["name"]: row["node_ms"] for row in rows[:2]})


def test_bench_of_several_sizes_as_csv(exported: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-t", "1", "-r", "2", "--loads", "1", "-p", "16,8", "-n", "4,2", "-d", "8,40", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(run(capsys, "bench", exported["gpt2"], exported["dmpt"], *options))))
    tests = ["pp16", "pp8", "tg4 @ d8", "tg4 @ d40", "tg2 @ d8", "tg2 @ d40"]
    assert [(row["name"], row["test"]) for row in rows] == [(n, t) for n in ("gpt2", "dmpt") for t in tests]
    for row in rows:
        assert 0 < float(row["tokens_per_s_min"]) <= float(row["tokens_per_s"]) <= float(row["tokens_per_s_max"])
        assert float(row["ratio"]) > 0
        assert int(row["rss_bytes"]) > 0
        if row["test"].startswith("tg"):
            assert 0 < float(row["python_share"]) < 1
            assert float(row["roof_share"]) > 0


def test_the_greedy_tokens_that_are_timed_are_the_models_own(exported: dict[str, str]) -> None:
    import runtime
    from benchmarks.peers.adapters.dmpt_onnx import load

    with runtime.load(exported["dmpt"], threads=1) as model:
        expected: Any = model.generate([5, 6, 7], max_new_tokens=20)
        routes = [model.manifest.leaves.index(name) for name in model.routes([5, 6, 7, *expected])[3:]]
    adapter = load(exported["dmpt"], 1, "cpu")
    adapter.prefill([9, 9, 9, 9])  # what was fed before leaves no trace
    _, ids, taken = adapter.decode([5, 6, 7], len(expected))
    assert ids == expected
    assert taken == routes


def test_compare_with_control(
    exported: dict[str, str], tiny_dmpt: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = (f"tuned={exported['gpt2']}", f"ours={exported['dmpt']}", str(tiny_dmpt))
    options = ("--data", text, "--threads", "1", "--repetitions", "1", "--prompt", "16", "--gen", "4")
    said = run(capsys, "compare", *models, *options, "--control", "tuned", "--out", str(tmp_path / "out"))
    assert "DMPT against the control" in said
    assert "equal training not recorded" in said
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    tuned, ours, checkpoint = stored["rows"]
    assert checkpoint["perplexity"] == pytest.approx(ours["perplexity"], rel=TOLERANCE["float32", "float"])
    assert checkpoint["parameters"] == ours["parameters"]
    assert checkpoint["parameters_touched_per_token"] == ours["parameters_touched_per_token"]
    assert tuned["control"]
    assert tuned["decode_tokens_per_s"] > 0
    assert "decode_tokens_per_s" not in checkpoint
    assert (tmp_path / "out" / "comparison.svg").read_text().count("<circle") >= 3
    assert "control is missing" in run(capsys, "compare", *models, *options)


def test_compare_without_text(exported: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--threads", "1", "--repetitions", "1", "--prompt", "8", "--gen", "2")
    row = run(capsys, "compare", exported["gpt2"], *options).splitlines()[2].split("|")
    assert row[5].strip() == row[6].strip() == "-"
    assert float(row[7]) > 0


def test_bad_input_is_one_line_and_code_3(
    tiny_gpt2: Path, exported: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    (tmp_path / "short").write_text("a\n")
    (tmp_path / "no model").mkdir()
    gpt2 = str(tiny_gpt2)
    for arguments, said in (
        (("eval", str(tmp_path / "gone"), "--data", text), "gone"),
        (("eval", str(tmp_path / "no model"), "--data", text), "no model"),
        (("eval", gpt2, "--data", str(tmp_path / "empty")), "empty"),
        (("eval", gpt2, "--data", str(tmp_path / "latin")), "UTF-8"),
        (("eval", gpt2, "--data", str(tmp_path / "short")), "longer text"),
        (("eval", gpt2, "--data", str(tmp_path / "gone.txt")), "gone.txt"),
        (("eval", gpt2, "--data", text, "--max-length", "1000"), "64"),
        (("eval", gpt2, "--data", text, "--mode", "sideways"), "sideways"),
        (("eval", exported["gpt2"], "--data", text, "--mode", "gate_soft"), "evaluate its checkpoint"),
        (("eval", exported["dmpt"], "--data", text, "--fast-k", "8"), "has a fixed fast-k"),
        (("eval", gpt2, "--data", text, "--fast-k", "301"), "vocabulary size 300"),
        (("bench", gpt2), "dmpt-export onnx"),
        (("bench", exported["gpt2"], "--prompt", "64", "--gen", "1"), "do not fit"),
        (("bench", exported["gpt2"], "--depth", "64"), "do not fit"),
        (("compare", gpt2, str(tmp_path / "gone")), "gone"),
        (("compare", gpt2, f"x={tmp_path / 'gone'}", "--data", text), "gone"),
    ):
        assert said in run(capsys, *arguments, code=3)


def test_wrong_usage_is_code_2(tiny_gpt2: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = str(tiny_gpt2)
    for arguments in (
        ("eval", gpt2),
        ("eval", gpt2, "--data", text, "--stride", "0"),
        ("bench",),
        ("bench", gpt2, "-p", "8,x"),
        ("bench", gpt2, "-p", "8,0"),
        ("bench", gpt2, "--format", "xml"),
        ("compare",),
        ("compare", gpt2, "--control", "nobody"),
    ):
        run(capsys, *arguments, code=2)
