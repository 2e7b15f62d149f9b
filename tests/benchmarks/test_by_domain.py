"""Quality by domain: `eval --domain` and `inspect --domain` against separate evaluations of each text and path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import dmpt_export
from dmpt_export.onnx.export import export_onnx
from tests.helpers.checkpoints import edit_config
from tests.helpers.cli import run


@pytest.fixture
def texts(tmp_path: Path, sample_text: str) -> dict[str, str]:
    half = len(sample_text) // 2
    out = {}
    for name, text in (("prose", sample_text[:half]), ("more", sample_text[half:]), ("code", "x = 1\ny = x\n" * 60)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        out[name] = str(tmp_path / f"{name}.txt")
    return out


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def given(texts: dict[str, str]) -> list[str]:
    pairs = (f"prose={texts['prose']}", f"code={texts['code']}", f"prose={texts['more']}")
    return [part for pair in pairs for part in ("--domain", pair)]


def test_each_domain_is_evaluated_as_if_alone_and_on_each_path(
    dmpt_copy: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(dmpt_copy, domains={"prose": "right", "other": "left"})
    found = report(capsys, "eval", dmpt_copy, *given(texts))["domains"]
    assert list(found) == ["prose", "code"]
    alone = ("path_alone_perplexity", "serving", "as_taught")
    for name, files in (("prose", ["prose", "more"]), ("code", ["code"])):
        data = [part for file in files for part in ("--data", texts[file])]
        want = report(capsys, "eval", dmpt_copy, *data)
        assert {key: value for key, value in found[name].items() if key not in alone} == {
            key: value for key, value in want.items() if key != "model"
        }
        for leaf in ("left", "right"):
            want = report(capsys, "eval", dmpt_copy, *data, "--mode", f"{leaf}_only")
            assert found[name]["path_alone_perplexity"][leaf] == want["perplexity"]
    assert found["prose"]["serving"] == ["right"]
    assert found["prose"]["as_taught"] == found["prose"]["route_shares"]["right"]
    assert (found["code"]["serving"], found["code"]["as_taught"]) == ([], None)
    by_name = dmpt_export.evaluate_domains(dmpt_copy, {"code": texts["code"]})
    assert json.loads(json.dumps(by_name["code"].to_json())) == found["code"]

    assert run("onnx", dmpt_copy, tmp_path / "device") == 0
    exported = report(capsys, "eval", tmp_path / "device", *given(texts))["domains"]
    assert exported["prose"]["path_alone_perplexity"] == {}
    assert exported["prose"]["serving"] == ["right"]
    assert exported["prose"]["route_shares"] == pytest.approx(found["prose"]["route_shares"], abs=0.01)
    assert exported["prose"]["perplexity"] == pytest.approx(found["prose"]["perplexity"], rel=1e-3)


def test_inspect_draws_what_eval_says(
    dmpt_copy: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(dmpt_copy, domains={"prose": "right"})
    picture = tmp_path / "paths.svg"
    found = report(capsys, "inspect", dmpt_copy, *given(texts), "--picture", picture)["domains"]
    want = report(capsys, "eval", dmpt_copy, "--domain", f"code={texts['code']}")["domains"]
    for key in ("perplexity", "tokens_scored", "route_shares", "path_alone_perplexity"):
        assert found["code"][key] == want["code"][key]  # the text is shorter than what inspect reads
    drawn = ElementTree.fromstring(picture.read_text())
    bars = [e for e in drawn.iter("{http://www.w3.org/2000/svg}rect") if "x" in e.attrib]
    shares = [share for one in found.values() for share in one["route_shares"].values()]
    whole = sum(float(bar.attrib["width"]) for bar in bars) / 2  # of one domain
    assert [float(bar.attrib["width"]) / whole for bar in bars] == pytest.approx(shares, abs=1e-3)
    for file, more in ((picture, []), (dmpt_copy / "config.json", ["--overwrite"]), (texts["code"], ["--overwrite"])):
        before = Path(file).read_bytes()
        assert run("inspect", dmpt_copy, *given(texts), "--picture", file, *more) == 3
        assert Path(file).read_bytes() == before
    assert run("inspect", dmpt_copy, *given(texts), "--picture", picture, "--overwrite") == 0
    capsys.readouterr()
    assert run("inspect", dmpt_copy, *given(texts)) == 0
    assert "| prose " in capsys.readouterr().out


def test_a_gpt2_has_domains_without_paths(
    tiny_gpt2: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", tiny_gpt2, *given(texts)) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["domain", "tokens", "perplexity"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give --data FILE, or --domain NAME=FILE"),
        (["--data", "{prose}", "--domain", "a={prose}"], 2, "give --data FILE, or --domain NAME=FILE"),
        (["--domain", "{prose}"], 2, "NAME=FILE"),
        (["--domain", "a=nowhere.txt"], 3, "does not exist"),
        (["--domain", "a={prose}", "--base", "{model}"], 2, "leave it out with --domain"),
    ],
)
def test_wrong_domains_are_refused_in_one_line(
    tiny_dmpt: Path,
    texts: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    places = {**texts, "model": str(tiny_dmpt)}
    assert run("eval", tiny_dmpt, *(argument.format(**places) for argument in arguments)) == code
    assert message in capsys.readouterr().err


def test_a_picture_needs_domains(tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", tiny_dmpt, "--picture", tmp_path / "paths.svg") == 2
    assert "--domain NAME=FILE" in capsys.readouterr().err


@pytest.mark.parametrize("domains", [5, {"wiki": 5}, "xy", ["ab"], {"wiki": "middle"}])
def test_damaged_domains_of_a_manifest_are_one_line(
    tiny_dmpt: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], domains: Any
) -> None:
    export_onnx(tiny_dmpt, tmp_path / "device", verify=False)
    manifest = tmp_path / "device" / "dmpt_manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"domains": domains}))
    assert run("eval", tmp_path / "device", *given(texts)) == 3
    assert "domain" in capsys.readouterr().err


def test_finished_domains_of_a_killed_evaluation_are_not_scored_again(
    tiny_dmpt: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = report(capsys, "eval", tiny_dmpt, *given(texts), "--resume", tmp_path / "state")
    assert len(list((tmp_path / "state").glob("eval-*.npz"))) == 6  # two domains, as deployed and on two paths
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.quality.perplexity.judged", None)  # scores nothing
        assert report(capsys, "eval", tiny_dmpt, *given(texts), "--resume", tmp_path / "state") == whole


def test_a_text_that_is_too_short_is_named(
    tiny_dmpt: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a\n")
    assert run("eval", tiny_dmpt, "--domain", f"short={tmp_path / 'short.txt'}") == 3
    assert "domain 'short': " in capsys.readouterr().err
