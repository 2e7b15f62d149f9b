"""Tables, files and pictures of a comparison, and how its models are measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.comparison import comparison
from benchmarks.comparison.comparison import compare
from benchmarks.comparison.contestants import Entry, Settings
from benchmarks.comparison.model_result import Row
from benchmarks.comparison.output import save
from benchmarks.comparison.result import Comparison
from benchmarks.quality import perplexity
from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.perplexity import evaluate, read_text
from benchmarks.quality.scorer import named
from benchmarks.report import frontier, placing, svg
from benchmarks.report.table import markdown
from dmpt_export.cli.main import main
from tests.helpers.rows import BASE, DMPT, TUNED, row
from training.errors import InputError

SVG = "{http://www.w3.org/2000/svg}"


# --- table, JSON, Markdown --------------------------------------------------------------------------


def test_files_of_a_comparison(tmp_path: Path) -> None:
    unmeasured = row("GPT-2", "int4", 4, None, None)
    result = Comparison([BASE, *TUNED, *DMPT, unmeasured], ["text"], ["dmpt-export", "compare"], {"training": 7})
    save(result, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.csv",
        "comparison.json",
        "comparison.md",
        "comparison.svg",
        "report.html",
    ]
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert [r["name"] for r in stored["rows"]] == [r.name for r in result.rows]
    assert stored["rows"][1]["perplexity"] == pytest.approx(50)
    assert stored["rows"][1]["decode_tokens_per_s"] == 100
    assert "perplexity" not in stored["rows"][-1]
    assert "decode_tokens_per_s" not in stored["rows"][-1]
    assert stored["seeds"] == {"training": 7}
    assert {"cpu", "cores"} <= stored["machine"].keys()
    assert "python" in stored["versions"]
    assert stored["reading"] == result.reading
    text = (tmp_path / "out" / "comparison.md").read_text()
    for part in (result.table(), result.reading, result.conditions(), "comparison.svg"):
        assert part in text
    lines = result.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[2:-1] == [
        f" {cell} " for cell in ("     1,000", "              900", "  23.0 MB", "     61.00", "  30.0 %")
    ] + ["           210.0 ", "             1680 "]
    assert lines[-1].count(" - |") == 4
    save(result, tmp_path / "out")  # replaced
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"mine\.txt"):
        save(result, tmp_path / "out")


def test_without_perplexity_there_is_no_picture(tmp_path: Path) -> None:
    result = Comparison([row("GPT-2", "int4", 4, None, 100)], [], [])
    save(result, tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.svg").exists()
    assert "svg" not in result.as_markdown()


def test_a_cell_cannot_break_the_table() -> None:
    assert markdown(["model"], [["a|b"]]).splitlines()[2] == "| a\\|b  |"


def test_names_of_models_on_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "lr=1e-4"
    odd.mkdir()
    for twice in (["a=x", "a=y"], [str(odd), str(odd)]):
        with pytest.raises(InputError, match="several models have the name"):
            named(twice)
    assert named([str(odd), f"tuned={odd}", "gpt2", "x="]) == [
        ("lr=1e-4", str(odd)),
        ("tuned", str(odd)),
        ("gpt2", "gpt2"),
        ("x=", "x="),
    ]


# --- measuring checkpoints --------------------------------------------------------------------------


def test_checkpoints_are_scored_on_the_same_windows(
    tiny_gpt2: Path, tiny_dmpt: Path, sample_text: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text)
    entries = [
        Entry("base", str(tiny_gpt2)),
        Entry("tuned", str(tiny_gpt2), control=True),
        Entry("ours", str(tiny_dmpt)),
    ]
    result = compare(entries, [text], tmp_path / "out", Settings(max_length=40, stride=10), seeds={"training": 3})
    base, tuned, ours = result.rows
    assert base.quality
    assert tuned.quality
    assert ours.quality
    assert base.quality.perplexity == tuned.quality.perplexity != ours.quality.perplexity
    assert {r.quality.tokens_sha256 for r in result.rows if r.quality} == {base.quality.tokens_sha256}
    assert (base.family, tuned.family, ours.family) == ("GPT-2", "GPT-2 fine-tuned", "DMPT")
    assert [r.speed for r in result.rows] == [None] * 3
    assert result.seeds == {"prompt": 0, "training": 3}
    assert set(ours.quality.route_shares) == {"left", "right"}
    assert (tmp_path / "out" / "comparison.json").is_file()


@pytest.mark.parametrize("stopped", ["scoring", "timing"])
def test_rows_are_told_as_they_come_and_survive_an_interrupt(
    tiny_gpt2: Path, tiny_dmpt: Path, sample_text: str, tmp_path: Path, stopped: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text, scored = tmp_path / "text.txt", []
    text.write_text(sample_text)
    evaluate = perplexity.evaluate

    def counted(*args: Any, **kwargs: Any) -> Any:
        scored.append(args)
        if stopped == "scoring" and len(scored) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(perplexity, "evaluate", counted)
    if stopped == "timing":
        monkeypatch.setattr(comparison, "timed", interrupted)
    models = [f"first={tiny_gpt2}", f"second={tiny_dmpt}"]
    assert main(["compare", *models, "--data", str(text), "--max-length", "40", "--out", str(tmp_path / "out")]) == 130
    out, err = capsys.readouterr()
    assert "1 of 2: first: perplexity " in err
    assert "| first " in out
    assert ("| second " in out) == ("2 of 2: second: perplexity " in err) == (stopped == "timing")
    assert ("Not scored when stopped: second." in out) == (stopped == "scoring")
    assert "is a DMPT" not in out
    assert "with --resume FOLDER scores are kept" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "stopped before a model was scored; with --resume FOLDER scores are kept, and the same command goes on"),
        (("--resume", "kept"), "stopped before a model was scored; the same command goes on with the scores in kept"),
    ],
)
def test_an_interrupt_before_the_first_row_says_how_to_go_on(
    tiny_gpt2: Path, sample_text: str, tmp_path: Path, more: tuple[str, ...], told: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    (tmp_path / "text.txt").write_text(sample_text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(perplexity, "evaluate", interrupted)
    assert main(["compare", str(tiny_gpt2), "--data", "text.txt", "--max-length", "40", *more]) == 130
    out, err = capsys.readouterr()
    assert told in err
    assert out == ""


def test_a_slow_dmpt_checkpoint_gets_one_hint(
    tiny_gpt2: Path, tiny_dmpt: Path, sample_text: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text(sample_text)
    entries = [Entry("base", str(tiny_gpt2)), Entry("one", str(tiny_dmpt)), Entry("two", str(tiny_dmpt))]
    compare(entries, [text], settings=Settings(max_length=40, stride=10))
    assert comparison.FASTER not in capsys.readouterr().err
    monkeypatch.setattr(comparison, "SLOW_S", 0.0)
    compare(entries, [text], settings=Settings(max_length=40, stride=10))
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(comparison.FASTER) == 1
    assert lines.index(comparison.FASTER) > next(i for i, line in enumerate(lines) if line.startswith("2 of 3: one"))
    compare(entries[:1], [text], settings=Settings(max_length=40, stride=10))
    assert comparison.FASTER not in capsys.readouterr().err


def test_a_comparison_follows_the_protocol(tiny_gpt2: Path, sample_text: str, tmp_path: Path) -> None:
    """The same figures as `eval` with that protocol, on JSON lines with a field of another name."""
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in sample_text.splitlines()))
    settings = Settings(protocol="sliding", max_length=32, stride=8, text_field="body")
    (row,) = compare([Entry("base", str(tiny_gpt2))], [tmp_path / "text.jsonl"], settings=settings).rows
    scorer = open_scorer(tiny_gpt2)
    text = read_text(scorer, [tmp_path / "text.jsonl"], "body", "sliding")
    assert row.quality
    assert row.quality.to_json() == evaluate(scorer, text, 32, 8, "sliding").to_json()
    stored = Comparison([row], [], []).as_csv().splitlines()
    found = dict(zip(stored[0].split(","), stored[1].split(","), strict=True))
    assert found["protocol"] == "sliding"
    assert float(found["bits_per_byte"]) == row.quality.bits_per_byte
    assert float(found["word_perplexity"]) == row.quality.word_perplexity
    assert float(found["top5_accuracy"]) > 0
    (tmp_path / "short").write_text("a")
    with pytest.raises(InputError, match="longer text"):  # the mistake concerns all models: no rows
        compare([Entry("base", str(tiny_gpt2))], [tmp_path / "short"])


def test_entries_that_cannot_be_compared_are_refused_first(tiny_gpt2: Path, tmp_path: Path) -> None:
    good = Entry("good", str(tiny_gpt2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for entries, out, said in (
        ([], None, "nothing to compare"),
        ([good, good], None, "have the name good"),
        ([good, Entry("gone", str(tmp_path / "gone"))], None, "gone"),
        ([good], tmp_path / "mine", "not empty"),
    ):
        with pytest.raises(InputError, match=said):
            compare(entries, [tmp_path / "no such text"], out)


# --- picture ----------------------------------------------------------------------------------------

CROWD = [
    BASE,
    *TUNED,
    *DMPT,
    row("GPT-2 fine-tuned", "int8-dynamic", 6.1, 50.5, 420),
    row("DMPT", "planned", 6.2, 50.8, 410),
    row("DMPT", "int8-dynamic", 14.8, 53.5, 310),
    row("GPT-2", "fp16", 11, 60, None),
    row("Other", "q4", 4.1, 55, 480),
]


@pytest.mark.parametrize(
    "rows", [CROWD, [BASE], [BASE, replace(BASE, name="twin")], [row("DMPT", "int4", 1, 9000, 9), BASE]]
)
@pytest.mark.parametrize("size", [frontier.NARROW, frontier.WIDE])
def test_labels_cover_neither_each_other_nor_markers(rows: list[Row], size: tuple[float, float]) -> None:
    drawing = frontier.drawn(rows, *size)
    assert drawing is not None
    drawn = list(ElementTree.fromstring(svg.picture_file("", *size, *drawing.parts)))
    labels = [box_of(element) for element in drawn if element.get("class") == "label"]
    markers = [
        placing.Box.around(float(e.get("cx", "")), float(e.get("cy", "")), 2 * radius, 2 * radius)
        for e in drawn
        if e.find(f"{SVG}title") is not None and (radius := float(e.get("r", "")))
    ]
    frame = placing.Box(50, 28, size[0] - 16, size[1] - 46)
    assert len(labels) == len(markers) == len(rows)
    for a, b in combinations(labels, 2):
        assert placing.overlap(a, b) == 0
    for label in labels:
        assert sum(placing.overlap(label, marker) for marker in markers) == 0
        assert placing.outside(label, frame) < 1e-6


def box_of(label: ElementTree.Element) -> placing.Box:
    """About the pixels that a label's letters take."""
    width = svg.LETTER * len(label.text or "")
    return placing.Box.around(float(label.get("x", "")), float(label.get("y", "")) - 4, width, svg.FONT)


def test_marker_area_is_speed() -> None:
    half, whole = (frontier.radius(row("x", "int8", 1, 50, speed), 550) for speed in (275, 550))
    assert half**2 == pytest.approx(whole**2 / 2)


def test_families_have_colours_of_their_own() -> None:
    families = ["GPT-2 base", "GPT-2 fine-tuned", "DMPT", "GPT-2", "one", "two"]
    assert len(set(frontier.colour_numbers(families).values())) == 6
    assert frontier.colour_numbers(families[1:])["DMPT"] == frontier.colour_numbers(families)["DMPT"]
