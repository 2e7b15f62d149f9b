"""`run` on a terminal without a prompt, long prompts, and batches with lines that cannot be continued."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runtime
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from runtime.errors import RequestError
from runtime.truncation import LEFT, MIDDLE, RIGHT, SIDES, shortened


@pytest.fixture(scope="module")
def device(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("device") / "gpt2"
    export_onnx(tiny_gpt2, out)
    return out


# --- long prompts -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12), st.sampled_from(SIDES), st.integers(0, 2))
def test_shortened_keeps_the_right_items(items: list[int], most: int, side: str, kept: int) -> None:
    found = shortened(items, most, side, kept)
    if len(items) <= most:
        assert found == items
        return
    assert len(found) == min(len(items), max(most, kept + 1))
    assert found[:kept] == items[:kept]
    body, rest = found[kept:], items[kept:]
    if side == RIGHT:
        assert body == rest[: len(body)]
    elif side == LEFT:
        assert body == rest[-len(body) :]
    else:
        head = len(body) // 2
        assert body == rest[:head] + rest[len(rest) - (len(body) - head) :]


@pytest.mark.parametrize("side", SIDES)
def test_a_long_prompt_gives_the_text_of_its_part(side: str, device: Path) -> None:
    prompt = np.random.default_rng(0).integers(1, 300, 150).tolist()  # the context is 64 tokens
    with runtime.load(device) as model:
        part = shortened(prompt, 54, side)
        assert model.generate(prompt, 10, truncate=side) == model.generate(part, 10)
        assert model.generate(prompt[:60], 4, truncate=side) == model.generate(prompt[:60], 4)  # it fits
        assert model.generate([prompt, part], 10, truncate=side)[0] == model.generate(part, 10)
        with pytest.raises(RequestError, match="150 tokens do not fit the context of 64"):
            model.generate(prompt, 10)
        with pytest.raises(RequestError, match="truncate 'up' must be one of left, middle, right"):
            model.generate(prompt, 10, truncate="up")


def test_to_slide_reads_the_end_of_a_long_prompt(device: Path) -> None:
    prompt = np.random.default_rng(1).integers(1, 300, 200).tolist()
    with runtime.load(device) as model:
        assert model.generate(prompt, 40, on_full="slide") == model.generate(prompt[-32:], 40, on_full="slide")
        middle = shortened(prompt, 32, MIDDLE)
        assert model.generate(prompt, 40, on_full="slide", truncate=MIDDLE) == model.generate(
            middle, 40, on_full="slide"
        )


def test_a_text_far_beyond_the_context_is_cut_before_it_is_tokenised(device: Path) -> None:
    with runtime.load(device) as model:
        assert model.generate("a tide " * 100_000, 5, truncate=LEFT) != ""
        with pytest.raises(RequestError, match="choose where to cut it"):
            model.generate("a tide " * 100_000, 5)


# --- batches ----------------------------------------------------------------------------------------


def test_lines_that_cannot_be_continued_are_rows_with_an_error(
    device: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["The tide", "", "mill " * 200, "waits"]

    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    give("\n".join(lines))
    assert main(["run", str(device), "--batch", "-n", "5", "--seed", "3"]) == 3
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [sorted(row) for row in rows] == [["ids", "stop_reason", "text"], ["error"], ["error"], sorted(rows[0])]
    assert "empty" in rows[1]["error"]
    assert "do not fit the context" in rows[2]["error"]
    where = 'see "error" in lines 2, 3 of the output'
    assert captured.err == f"Error: 2 of 4 prompts could not be continued: {where}\n"
    with runtime.load(device) as model:  # each has the seed of its line
        made = model.stream(["The tide", "x", "x", "waits"], 5, seed=3)
        assert list(made)
        assert [rows[0]["ids"], rows[3]["ids"]] == [made.texts[0].ids, made.texts[3].ids]  # type: ignore[union-attr]
    give("\n".join(lines))
    assert main(["run", str(device), "--batch", "-n", "5", "--truncate", "left"]) == 3
    assert len([line for line in capsys.readouterr().out.splitlines() if "error" not in line]) == 3
    capsys.readouterr()
    give("The tide\n\nmill")
    assert main(["run", str(device), "--batch", "-n", "1"]) == 3
    assert capsys.readouterr().err.endswith(
        '1 of 3 prompts could not be continued: see "error" in line 2 of the output\n'
    )
    give("The tide\n" + 12 * "\n")
    assert main(["run", str(device), "--batch", "-n", "1"]) == 3
    err = capsys.readouterr().err
    assert "12 of 13 prompts" in err
    assert "in lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more of the output" in err
    give("\n\n")
    assert main(["run", str(device), "--batch"]) == 3


def test_echo_prints_the_prompt_first(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(device), "The tide", "-n", "4"]) == 0
    text = capsys.readouterr().out
    assert main(["run", str(device), "The tide", "-n", "4", "--echo"]) == 0
    assert capsys.readouterr().out == f"The tide{text}"


# --- a terminal -------------------------------------------------------------------------------------


def test_a_conversation_on_a_terminal(device: Path) -> None:
    """A prompt, the same recalled with the arrow key, one of two lines, an empty one, and one that is too long; Ctrl-D
    leaves with exit code 0."""
    pid, terminal = pty.fork()
    if pid == 0:  # the child, whose standard streams are the terminal
        os.execv(sys.executable, [sys.executable, "-m", "dmpt_export", "run", str(device), "-n", "4", "--echo"])
    shown = b""

    def until(mark: bytes) -> None:
        nonlocal shown
        seen = b""
        while mark not in seen:
            seen += os.read(terminal, 4096)
        shown += seen

    until(b"> ")
    for line in (b"The tide\n", b"\x1b[A\n", b"two\\\nlines\n", b"\n", b"mill " * 200 + b"\n"):
        os.write(terminal, line)
        until(b"> ")
    os.write(terminal, b"\x04")
    status = os.waitpid(pid, 0)[1]
    said = shown.decode(errors="replace").replace("\r\n", "\n")
    assert os.waitstatus_to_exitcode(status) == 0
    assert "Ctrl-D leaves" in said
    with runtime.load(device) as model:
        assert said.count(f"The tide{model.generate('The tide', 4)}") == 2
        assert f"two\nlines{model.generate('two' + chr(10) + 'lines', 4)}" in said
    assert "Error: " in said
    assert "do not fit the context" in said


def test_without_a_terminal_standard_input_is_one_prompt(
    device: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The tide\nmill\n")))
    assert main(["run", str(device), "-n", "3"]) == 0
    with runtime.load(device) as model:
        assert capsys.readouterr().out.rstrip("\n") == model.generate("The tide\nmill", 3).rstrip("\n")
