"""The command group: its help, its start time, exit codes and messages."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from dmpt_export import __version__
from dmpt_export.cli import main as cli

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "numpy", "tokenizers", "safetensors")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dmpt_export", *args], capture_output=True, text=True, timeout=60)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A verb that raises a given error; returns a function (error) -> exit code of main()."""

    def raise_in_verb(error: BaseException) -> int:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)
        return cli.main(["run"])

    return raise_in_verb


# --- help ---------------------------------------------------------------------------------------


def test_help_lists_the_verbs_in_the_order_of_the_work() -> None:
    done = run("--help")
    assert done.returncode == 0
    commands = done.stdout.split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in commands if line.strip() and line.startswith("  ") and line[2] != " "] == list(
        cli.VERBS
    )


def test_help_loads_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys\nfrom dmpt_export.cli.main import main\nassert main(['--help']) == 0\n"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\nassert not loaded, loaded\n"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 1.0, "0.3 s on a quiet machine; more than a second means that something heavy is imported"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_teaches(verb: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), verb)
    assert command is not None
    text = command.get_help(click.Context(command, info_name=f"dmpt-export {verb}"))
    assert command.get_short_help_str(), "the group's help needs a line for it"
    assert f"dmpt-export {verb}" in text.split("Options:")[0].split("\n", 1)[1], "an example is missing"


def test_version() -> None:
    assert run("--version").stdout == f"dmpt-export {__version__}\n"


# --- exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["no-such-verb"], ["--no-such-option"], ["run", "--no-such-option"], []])
def test_wrong_usage_is_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    assert capsys.readouterr().out == ""


class Refused(ValueError):
    exit_code = 4


def test_an_error_with_an_exit_code_is_one_line(failing, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert failing(Refused("row 1\n  differs\nby 2")) == 4
    assert capsys.readouterr() == ("", "Error: row 1 differs by 2\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/there"), 3, "Permission denied: '/there'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/there"), 3, "Is a directory: '/there'"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "No space left on device: free some"),
        (OSError("4096 requested and 128 written"), 5, "no space left"),
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), 5, "out of memory"),
        (RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for 8 bytes"), 5, "out of memory"),
        (click.ClickException("no"), 3, "no"),
    ],
)
def test_errors_of_the_system(failing, capsys, error: Exception, code: int, message: str) -> None:  # type: ignore[no-untyped-def]
    assert failing(error) == code
    err = capsys.readouterr().err
    assert err.startswith(f"Error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no number, no file"), RuntimeError("shape mismatch")])
def test_a_bug_keeps_its_traceback(failing, error: Exception) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(type(error)):
        failing(error)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupted_is_130(failing, capsys: pytest.CaptureFixture[str], error: BaseException) -> None:  # type: ignore[no-untyped-def]
    assert failing(error) == 130
    assert capsys.readouterr().err == "Interrupted\n"


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(cli.cli, "invoke", lambda context: None)
    assert cli.main(["inspect", "x"]) == 0


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "dmpt_export", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


# --- bad input, through the verbs ----------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["run", "{none}", "text"],
        ["serve", "{none}", "--port", "0"],
        ["serve", "{empty_folder}", "--port", "0"],
        ["init", "{none}", "{out}"],
        ["quantize", "{none}", "{out}", "--scheme", "int8"],
        ["onnx", "{none}", "{out}"],
        ["eval", "{none}", "--data", "{empty}"],
        ["bench", "{none}"],
        ["compare", "{none}", "--data", "{empty}"],
        ["inspect", "{none}"],
        ["convert", "{none}", "{out}"],
        ["run", "{empty_folder}", "text"],
        ["quantize", "{empty_folder}", "{out}", "--scheme", "int4"],
        ["demo", "--out", "{out}", "--data", "{empty}"],
    ],
    ids=lambda args: " ".join(args),
)
def test_bad_input_is_3_in_one_line_and_leaves_nothing(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out"
    names = {
        "none": tmp_path / "none",
        "out": out,
        "empty": tmp_path / "empty.txt",
        "empty_folder": tmp_path / "folder",
    }
    done = run(*(arg.format(**names) for arg in args))
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "folder"]
