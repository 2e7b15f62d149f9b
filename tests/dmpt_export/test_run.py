"""`dmpt-export run`: stdout and stderr, exit codes, and that it needs no torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import runtime
from dmpt_export.cli import run
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from tests.helpers.cli import TRAINING, command_without

PROMPT = "The tide mill"


@pytest.fixture(scope="module")
def model(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("run") / "onnx"
    export_onnx(tiny_dmpt, out, verify=False)
    return str(out)


@pytest.fixture
def given_stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def expected(model: str, **options: object) -> str:
    with runtime.load(model, threads=1) as loaded:
        text = loaded.generate(PROMPT, **options)  # type: ignore[arg-type]
    assert isinstance(text, str)
    return text


def test_the_text_goes_to_stdout_and_nothing_else_does(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", model, PROMPT, "-n", "20", "--threads", "1"]) == 0
    out, err = capfd.readouterr()
    assert out == expected(model, max_new_tokens=20) + "\n"
    assert err == ""


def test_options_reach_the_sampler(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "8"]
    assert main(["run", model, PROMPT, "--max-new-tokens", "25", *args]) == 0
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 8}
    assert capfd.readouterr().out == expected(model, max_new_tokens=25, **options) + "\n"


def test_stop_strings_may_be_repeated(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = expected(model, max_new_tokens=30, seed=2)
    stop = whole[5:7]
    assert main(["run", model, PROMPT, "-n", "30", "--seed", "2", "--stop", "never seen", "--stop", stop]) == 0
    assert capfd.readouterr().out == whole[: whole.index(stop)] + "\n"


def test_a_batch_is_one_line_of_json_for_each_line(
    model: str, given_stdin: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = [PROMPT, "stones", "The wheel was five"]
    given_stdin("\r\n".join([*prompts, ""]).encode())
    assert main(["run", model, "--batch", "-n", "20", "--seed", "3", "--threads", "1"]) == 0
    out, err = capfd.readouterr()
    got = [json.loads(line) for line in out.splitlines()]
    with runtime.load(model, threads=1) as loaded:
        assert [line["text"] for line in got] == loaded.generate(prompts, max_new_tokens=20, seed=3)
        assert [line["ids"] for line in got] == loaded.generate(
            [loaded.encode(prompt) for prompt in prompts], max_new_tokens=20, seed=3
        )
    assert {line["stop_reason"] for line in got} <= {"max_new_tokens", "end_of_text"}
    assert err == ""


def test_a_batch_refuses_a_bias_for_an_unknown_token(
    model: str, given_stdin: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    given_stdin(b"stones\nwheels\n")
    assert main(["run", model, "--batch", "--logit-bias", "999999=1"]) == 3
    assert "logit_bias for token 999999: this model's tokens are 0 to" in capfd.readouterr().err


def test_a_full_context_and_guesses(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["run", model, PROMPT, "-n", "150", "--threads", "1"]
    texts = []
    for more in ([], ["--on-full", "slide"], ["--on-full", "slide", "--speculate", "5"]):
        assert main([*args, *more]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == expected(model, max_new_tokens=150) + "\n"
    assert texts[1] == texts[2] == expected(model, max_new_tokens=150, on_full="slide") + "\n"


def test_deterministic_is_one_thread_whatever_is_there(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", model, PROMPT, "-n", "30", "--seed", "1", "--deterministic", "--json"]) == 0
    got = json.loads(capfd.readouterr().out)
    assert got["threads"] == 1
    assert got["text"] == expected(model, max_new_tokens=30, seed=1)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_prompt_may_come_on_stdin(
    ending: str, model: str, given_stdin: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    given_stdin((PROMPT + ending).encode())
    assert main(["run", model, "-n", "10"]) == 0
    assert capfd.readouterr().out == expected(model, max_new_tokens=10) + "\n"


def test_verbose_says_speed_and_paths_on_stderr(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", model, PROMPT, "-n", "30", "--seed", "1", "-v"]) == 0
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    for part in ("30 tokens", "tokens/s", "threads", "stopped by max_new_tokens", "left ", "right "):
        assert part in err


def test_json_is_one_object(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", model, PROMPT, "-n", "20", "--seed", "1", "--threads", "1", "--json"]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert err == ""
    got = json.loads(out)
    assert got["text"] == expected(model, max_new_tokens=20, seed=1)
    assert len(got["ids"]) == got["new_tokens"] == 20
    assert got["stop_reason"] == "max_new_tokens"
    assert sum(got["path_shares"].values()) == pytest.approx(1)
    assert set(got["path_shares"]) == {"left", "right"}
    assert got["decode_tokens_per_s"] > 0
    assert got["prefill_tokens_per_s"] > 0
    assert got["threads"] == 1


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["{model}", ""], 3, "prompt is empty"),
        (["{model}", "tide mill " * 60], 3, "do not fit the context of 64"),
        (["{model}", "x" * 100_000], 3, "100000 bytes"),
        (["{model}", "a\udcff"], 3, "not valid UTF-8"),
        (["{model}", "a", "--temperature", "-1"], 2, "temperature -1.0"),
        (["{model}", "a", "--top-k", "0"], 2, "top_k 0"),
        (["{model}", "a", "--top-p", "nan"], 2, "top_p nan"),
        (["{model}", "a", "--repetition-penalty", "0"], 2, "repetition_penalty 0.0"),
        (["{model}", "a", "--threads", "0"], 2, "threads 0"),
        (["{model}", "a", "--device", "cuda"], 3, "--target cuda"),
        (["{model}/model.onnx", "a"], 3, "is not a folder"),
        (["nowhere", "a"], 3, "nowhere is not a folder"),
        (["{model}", "a", "--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["{model}", "a", "--speculate", "99"], 2, "speculate 99"),
        (["{model}", "a", "--deterministic", "--threads", "2"], 2, "threads 2 and deterministic exclude each other"),
        (["{model}", "a", "--on-full", "wrap"], 2, "on-full"),
        (["{model}", "a", "--batch"], 2, "leave PROMPT out"),
        (["{model}", "--batch", "--json"], 2, "leave --json, --echo and -v out"),
        (["{model}", "--batch", "-v"], 2, "leave --json, --echo and -v out"),
        (["{model}", "a", "--logit-bias", "999999=1"], 3, "logit_bias for token 999999: this model's tokens are 0 to"),
        (["{model}", "a", "--colour"], 2, "No such option"),
        ([], 2, "Missing argument 'MODEL'"),
    ],
)
def test_bad_input(args: list[str], code: int, message: str, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *(arg.format(model=model) for arg in args)]) == code
    out, err = capfd.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert code == 2 or err.count("\n") == 1


@pytest.mark.parametrize(("data", "message"), [(b"a\xffb", "not UTF-8 (byte 1)"), (b"", "prompt is empty")])
def test_bad_stdin(
    data: bytes, message: str, model: str, given_stdin: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    given_stdin(data)
    assert main(["run", model]) == 3
    assert message in capfd.readouterr().err


def test_stdin_has_a_limit(
    model: str,
    given_stdin: Callable[[bytes], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "MOST_INPUT", 5)
    given_stdin(b"123456")
    assert main(["run", model]) == 3
    assert "standard input is larger" in capfd.readouterr().err


def test_no_stdin_at_all(model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["run", model]) == 3
    assert "there is no prompt" in capfd.readouterr().err


def test_ctrl_c_is_130(model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(self: run.Clock, path: str) -> None:
        if self.paths["left"] + self.paths["right"] == 3:
            raise KeyboardInterrupt
        self.paths[path] += 1

    monkeypatch.setattr(run.Clock, "tick", interrupted)
    assert main(["run", model, PROMPT]) == 130
    assert capfd.readouterr().out == expected(model, max_new_tokens=3).rstrip("\ufffd") + "\n"  # half a character waits


def cli(model: str, args: list[str], head: bool = False) -> subprocess.CompletedProcess[str]:
    """The command in a separate process that cannot import the training packages."""
    command = command_without((*TRAINING, "training", "quant"), "run", model, *args)
    if not head:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # a reader that is gone before the first word
        return subprocess.CompletedProcess(command, process.wait(), "", process.stderr.read())


def test_it_runs_without_torch(model: str) -> None:
    done = cli(model, [PROMPT, "-n", "12"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected(model, max_new_tokens=12) + "\n"


def test_a_reader_that_left_is_no_error_message(model: str) -> None:
    done = cli(model, [PROMPT, "-n", "12"], head=True)
    assert done.returncode == 141
    assert done.stderr == ""
