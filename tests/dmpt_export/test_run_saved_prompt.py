"""`run --save-prompt` and `run --after`: the text of both together, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import runtime
from dmpt_export.onnx.export import export_onnx
from runtime.model import Model
from runtime.sequence import Sequence
from tests.helpers.cli import run

RULES, QUESTION = "The tide mill", " is driven by"


@pytest.fixture
def saved(dual_device: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    assert run("run", dual_device, RULES, "--threads", 1, "--save-prompt", tmp_path / "saved") == 0
    assert capfd.readouterr() == ("", "")
    return tmp_path / "saved"


def read(model: Model, *texts: str) -> Sequence:
    """The texts one after the other; only the first begins with the folder's prefix."""
    sequence = model.sequence()
    for i, text in enumerate(texts):
        sequence.feed(model.encode(text)[len(model.manifest.prefix) if i else 0 :], every_path=True)
    return sequence


def test_the_text_follows_the_saved_one(dual_device: Path, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["-n", 20, "--seed", 3, "--threads", 1]
    with runtime.load(dual_device, threads=1) as model:
        want = model.generate(QUESTION, 20, seed=3, after=read(model, RULES))
        ids = model.encode(RULES) + model.encode(QUESTION)
        assert want == model.decode(model.generate(ids, 20, seed=3))
    for _ in range(2):
        assert run("run", dual_device, QUESTION, "--after", saved, *options) == 0
        assert capfd.readouterr().out == f"{want}\n"
    assert run("run", dual_device, QUESTION, "--after", saved, *options, "--json") == 0
    got = json.loads(capfd.readouterr().out)
    assert got["text"] == want
    assert got["prompt_tokens"] == len(ids)
    assert got["saved_tokens"] == len(ids) - len(model.encode(QUESTION))


def test_an_empty_prompt_continues_the_saved_text(
    dual_device: Path, saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("run", dual_device, "", "--after", saved, "-n", 20, "--threads", 1) == 0
    with runtime.load(dual_device, threads=1) as model:
        assert capfd.readouterr().out == f"{model.generate(RULES, 20)}\n"
        assert set(runtime.load_prompt(model, saved).done.values()) == {len(model.encode(RULES))}  # on every path


def test_a_batch_follows_it(
    dual_device: Path, saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmpt_export.cli.run.read_prompt", lambda: f"{QUESTION}\n and\n{'x' * 99}")
    assert run("run", dual_device, "--batch", "--after", saved, "-n", 9, "--threads", 1) == 3
    got = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    with runtime.load(dual_device, threads=1) as model:
        rules = read(model, RULES)
        assert [line.get("text") for line in got[:2]] == [model.generate(q, 9, after=rules) for q in (QUESTION, " and")]
    assert "that are already there do not fit the context of 64" in got[2]["error"]


def test_a_saved_text_can_be_extended(
    dual_device: Path, saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        run("run", dual_device, QUESTION, "--after", saved, "--save-prompt", tmp_path / "longer", "-v", "--threads", 1)
        == 0
    )
    with runtime.load(dual_device, threads=1) as model:
        longer = read(model, RULES, QUESTION)
        assert capfd.readouterr() == ("", f"{longer.length} tokens saved to {tmp_path / 'longer'}\n")
        longer.save(tmp_path / "want")
    assert (tmp_path / "longer").read_bytes() == (tmp_path / "want").read_bytes()


def test_the_prefix_of_texts_is_not_repeated(dual_device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.load(dual_device, threads=1) as model:
        assert model.codec is not None
        monkeypatch.setattr(model.codec, "prefix", [7, 8])
        rules = model.sequence()
        rules.feed(model.encode(RULES))
        made = model.stream([QUESTION], 1, after=rules)
        assert made.texts[0].prompt.tolist() == [7, 8, *model.encode(RULES)[2:], *model.encode(QUESTION)[2:]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--after", "{tmp}/nowhere"], 3, "nowhere cannot be read (No such file or directory)"),
        (["--after", "{tmp}/text"], 3, "text is not a saved prompt: give a file that a prompt was saved to"),
        (["--after", "{tmp}"], 3, "is not a regular file"),
        (["--save-prompt", "{tmp}/text"], 3, "text is not a saved prompt: it would be replaced"),
        (["--save-prompt", "{tmp}/nowhere/saved"], 3, "nowhere is not a folder"),
        (["--save-prompt", "{tmp}/new", "--json"], 2, "leave --json and --echo out"),
        (["--save-prompt", "{tmp}/new", "--echo"], 2, "leave --json and --echo out"),
        (["--save-prompt", "{tmp}/new", "--batch"], 2, "--batch"),
    ],
)
def test_mistakes_are_seen_before_a_model_is_loaded(
    options: list[str], code: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("some text")
    prompt = [] if "--batch" in options else ["a"]
    assert run("run", "no-model", *prompt, *(option.format(tmp=tmp_path) for option in options)) == code
    out, err = capfd.readouterr()
    assert message in err
    assert out == ""
    assert (tmp_path / "text").read_text() == "some text"


def test_a_prompt_of_another_model(
    dual_device: Path, saved: Path, tiny_quad: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_onnx(tiny_quad, tmp_path / "quad", verify=False)
    assert run("run", tmp_path / "quad", QUESTION, "--after", saved) == 3
    err = capfd.readouterr().err
    assert "was saved with a different model of the same name as 'model' (weights 'float'" in err
    assert err.count("\n") == 1
