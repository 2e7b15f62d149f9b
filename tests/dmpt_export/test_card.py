"""`card`: measured figures on a model's card, in a form that the hub's own reader takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import runtime
from benchmarks.quality.scorer import onnx_size
from benchmarks.report.card import BEGIN, END, with_figures
from dmpt_export.onnx.export import export_onnx
from runtime.errors import ModelError
from tests.helpers.cli import run


@pytest.fixture(scope="module")
def exported(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "device"
    export_onnx(tiny_gpt2, out, verify=False)
    return out


@pytest.fixture
def device(exported: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported, tmp_path / "device"))


def comparison(folder: Path, **changes: Any) -> dict[str, Any]:
    """A comparison.json with a row for the folder, and one for another."""
    row = {
        "name": "mine", "path": str(folder), "kind": "onnx", "scheme": "fp32", "size_bytes": onnx_size(folder),
        "failure": None, "perplexity": 87.53, "word_perplexity": 1e16, "bits_per_byte": 1.8923, "accuracy": 0.2179,
        "tokens_scored": 280232, "protocol": "stride-concat", "max_length": 256, "stride": 128,
        "decode_tokens_per_s": 1870.44, "prefill_tokens_per_s": 25471.2, "threads": 1, "prompt_tokens": 128,
        "generated_tokens": 64, "repetitions": 5,
    } | changes  # fmt: skip
    return {
        "format": "dmpt-comparison", "format_version": 1, "rows": [row, row | {"name": "other", "path": "elsewhere"}],
        "data": ["/texts/wiki.test.raw"], "created": "2026-11-30T11:28:05+00:00", "machine": {"cpu": "A CPU"},
        "versions": {"dmpt-export": "0.1.0"},
    }  # fmt: skip


@pytest.fixture
def report(device: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "comparison.json").write_text(json.dumps(comparison(device)))
    return folder


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_the_figures(device: Path, report: Path) -> None:
    before = read(device)
    assert run("card", device, report) == 0
    data = ModelCard(read(device)).data
    results = {result.metric_type: result for result in data.eval_results}
    assert {kind: result.metric_value for kind, result in results.items()} == {
        "perplexity": 87.53, "word_perplexity": 1e16, "bits_per_byte": 1.8923, "accuracy": 0.2179,
    }  # fmt: skip
    assert results["perplexity"].dataset_name == "wiki.test.raw"
    assert results["perplexity"].task_type == "text-generation"
    assert "stride-concat, windows of 256, stride 128" in results["perplexity"].metric_name
    assert data.model_name == "device"
    assert data.tags == ["onnx", "gpt2"]
    assert read(device).startswith(before[: before.index("\n---\n")])
    for line in (
        " 1870.4 |",
        "Speed: 1 thread of A CPU;",
        "280,232 tokens of wiki.test.raw",
    ):
        assert line in read(device)


def test_the_folder_still_loads_and_its_other_files_are_still_compared(device: Path, report: Path) -> None:
    assert run("card", device, report) == 0
    runtime.load(device).close()
    (device / "README.md").unlink()
    runtime.load(device).close()
    (device / "README.md").symlink_to(report / "comparison.json")
    with pytest.raises(ModelError, match=r"README\.md is a symbolic or hard link"):
        runtime.load(device)
    (device / "README.md").unlink()
    (device / "README.md").hardlink_to(report / "comparison.json")
    with pytest.raises(ModelError, match=r"README\.md has"):
        runtime.load(device)
    (device / "README.md").unlink()
    with (device / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ModelError, match=r"tokenizer\.json has"):
        runtime.load(device)


def test_new_figures_replace_the_old_ones_and_nothing_else(device: Path, report: Path) -> None:
    assert run("card", device, report) == 0
    once = read(device)
    edited = once.replace("tags:", "# a remark\nlicense: mit\ntags:").replace("\n---\n", "\nlanguage: en\n---\n", 1)
    (device / "README.md").write_text(f"{edited}\n## Mine\n")
    (report / "comparison.json").write_text(json.dumps(comparison(device, perplexity=50.5)))
    assert run("card", device, report / "comparison.json", "--row", "mine") == 0
    data = ModelCard(read(device)).data
    assert (data.license, data.language) == ("mit", "en")
    assert [r.metric_value for r in data.eval_results if r.metric_type == "perplexity"] == [50.5]
    assert (read(device).count(BEGIN), read(device).count(END), read(device).count("## Mine")) == (1, 1, 1)
    assert "# a remark\n" in read(device)
    assert run("card", device, report, "--row", "mine") == 0
    assert len(read(device)) == len(read(device).rstrip("\n")) + 1


@pytest.mark.parametrize("card", ["", "# plain\n", "---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---\r\n# a\r\n"])
def test_any_card_gets_figures(card: str, exported: Path) -> None:
    about = comparison(exported)
    about["data"] = ['a "text": \\ \n.txt']
    name = 'x "y": \n- z'
    once = with_figures(card, name, about["rows"][0], about)
    assert with_figures(once, name, about["rows"][0], about) == once
    found = ModelCard(once)
    model, results = model_index_to_eval_results(found.data.to_dict()["model-index"])
    assert (model, results[0].dataset_name) == ('x "y": - z', 'a "text": \\ .txt')
    assert found.data.license == ("mit" if "mit" in card else None)


def test_without_a_text_there_is_no_index(exported: Path) -> None:
    gone = ("perplexity", "word_perplexity", "bits_per_byte", "accuracy", "tokens_scored")
    about = comparison(exported)
    row = {name: value for name, value in about["rows"][0].items() if name not in gone}
    text = with_figures("# a\n", "a", row, about | {"data": []})
    assert "model-index" not in text
    assert "decoding, tokens/s" in text
    assert "perplexity" not in text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda about: about["rows"][0].update(size_bytes=7), "are those of another model than"),
        (lambda about: about["rows"][0].update(scheme="int4"), "scheme int4 instead of fp32"),
        (lambda about: about["rows"][0].update(failure="no memory"), "mine failed in this comparison"),
        (lambda about: about["rows"][0].update(path="moved"), "has no rows for"),
        (lambda about: about.update(format="x"), "is not a comparison"),
        (lambda about: about.update(rows=[]), "is not a comparison"),
        (lambda about: about.update(rows=7), "is damaged (rows: 7 is not a list)"),
        (lambda about: about.update(rows={"a": 1}), "is damaged (rows"),
        (lambda about: about.update(rows=["a"]), "is damaged (rows[0]: 'a' is not an object)"),
        (lambda about: about["rows"][0].pop("path"), "is damaged (rows[0].path: missing)"),
        (lambda about: about.pop("machine"), "is damaged (machine: missing)"),
        (lambda about: about["rows"][0].pop("kind"), "figures of mine are damaged (kind: missing)"),
        (lambda about: about["rows"][0].pop("stride"), "figures of mine are damaged (stride: missing)"),
        (lambda about: about["rows"][0].update(threads="1"), "figures of mine are damaged (threads: '1' is not"),
        (lambda about: about["rows"][0].update(bits_per_byte=[]), "figures of mine are damaged (bits_per_byte"),
    ],
)
def test_figures_of_another_model_are_refused(
    change: Callable[[dict[str, Any]], object],
    match: str,
    device: Path,
    report: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    about, before = comparison(device), read(device)
    change(about)
    (report / "comparison.json").write_text(json.dumps(about))
    assert run("card", device, report) == 3
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1
    assert read(device) == before


@pytest.mark.parametrize("folder", [False, True])
def test_a_card_that_is_no_text_is_left_alone(
    folder: bool, device: Path, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = device / "README.md"
    card.unlink()
    if folder:
        card.mkdir()
    else:
        card.write_bytes(b"# caf\xe9\n")
    assert run("card", device, report) == 3
    err = capsys.readouterr().err
    assert "README.md cannot be read as UTF-8 text" in err
    assert err.count("\n") == 1
    assert folder or card.read_bytes() == b"# caf\xe9\n"
