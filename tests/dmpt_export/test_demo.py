"""The demo's pipeline, end to end, on a model small enough to train in seconds."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dmpt_export.cli import main as cli
from dmpt_export.demo import folder
from dmpt_export.demo.pipeline import Demo, opening
from dmpt_export.demo.settings import Settings
from training.checkpoints.checkpoint import load_state, read_config
from training.errors import InputError
from training.text.tokenizer import END_OF_TEXT
from training.text.windows import train_tokenizer

TINY = Settings(
    vocab_size=300, context=32, n_embd=32, n_layer=2, n_head=2, fast_k=8, gate_hidden=8,
    batch_size=4, base_steps=6, tune_steps=4, prompt=16, gen=8, repetitions=1, new_tokens=8,
)  # fmt: skip
ROWS = [
    "GPT-2 base fp32",
    "GPT-2 fine-tuned fp32", "GPT-2 fine-tuned int8", "GPT-2 fine-tuned int4",
    "DMPT fp32", "DMPT int8", "DMPT int4",
]  # fmt: skip
WORDS = "the mill stands by the river and grinds the corn of the village until the evening tide comes in".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(5)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(8, 16))).capitalize() + f" {i}." for i in range(400)]
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    Demo(out, [text], seed=3, settings=TINY).run()
    return out


def test_every_row_is_measured(made: Path) -> None:
    rows = json.loads((made / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ROWS
    for row in rows:
        assert 1 < row["perplexity"] < TINY.vocab_size * 2
        assert row["decode_tokens_per_s"] > 0 < row["prefill_tokens_per_s"]
        assert row["kind"] == "onnx"
    assert [row["name"] for row in rows if row["control"]] == ROWS[1:4]
    assert len({row["tokens_sha256"] for row in rows}) == 1
    assert (made / "comparison.md").read_text().count("\n| GPT-2") == 4
    assert (made / "comparison.svg").read_text().startswith("<svg")


def test_the_report_maps_the_layers_of_all_that_is_quantized(made: Path) -> None:
    page = (made / "report.html").read_text()
    for name in ROWS:
        assert (f"<summary>{name}</summary>" in page) == (not name.endswith("fp32")), name
    for folder_ in (made / "onnx").iterdir():
        report = folder_ / "quantization_report.json"
        assert report.is_file() == (not folder_.name.endswith("fp32"))
        if report.is_file():
            damages = [
                t["relative_error"] for t in json.loads(report.read_text())["tensors"] if t["scheme"] != "float32"
            ]
            assert damages
            assert all(0 < damage < 0.5 for damage in damages)


def test_only_results_stay(made: Path) -> None:
    assert sorted(p.name for p in made.iterdir()) == sorted([folder.MARKER, *folder.FOLDERS, *folder.RESULTS])
    assert not list(made.rglob("trainer_state"))
    assert len(list((made / "onnx").iterdir())) == len(ROWS)


def test_the_dmpt_forks_at_half_depth_with_four_heads_a_path(made: Path) -> None:
    config = read_config(made / "checkpoints" / "dmpt")
    assert config.splits == [TINY.n_layer // 2]
    assert config.head_allocation == {"left": [0, 1, 2, 3], "right": [4, 5, 6, 7]}
    assert config.fast_k == TINY.fast_k
    assert read_config(made / "checkpoints" / "gpt2-tuned").splits == []


def test_both_are_tuned_on_the_same_tokens_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    from training.text.batches import TokenBatches

    taken: list[bytes] = []
    original = TokenBatches.take

    def take(self: TokenBatches, position: int, count: int):  # type: ignore[no-untyped-def]
        batch = original(self, position, count)
        taken.append(batch.numpy().tobytes())
        return batch

    monkeypatch.setattr(TokenBatches, "take", take)
    for stage in ("quantize", "export", "generate", "compare"):
        monkeypatch.setattr(Demo, stage, lambda self, *args: None)
    Demo(tmp_path / "out", [text], seed=3, settings=TINY).run()
    base, tuned, dmpt = np.split(np.array(taken), [TINY.base_steps, TINY.base_steps + TINY.tune_steps])
    assert len(base) == TINY.base_steps
    assert list(tuned) == list(dmpt)
    assert len(tuned) == TINY.tune_steps


def test_the_same_seed_trains_the_same_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, made: Path
) -> None:
    for stage in ("quantize", "export", "generate", "compare"):
        monkeypatch.setattr(Demo, stage, lambda self, *args: None)
    Demo(tmp_path / "out", [text], seed=3, settings=TINY).run()
    for name in ("gpt2-base", "dmpt-init"):
        first, second = (load_state(out / "checkpoints" / name)[1] for out in (made, tmp_path / "out"))
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first)


def test_running_again_replaces_its_own_and_keeps_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    for stage in ("train_models", "quantize", "export", "generate", "compare"):
        monkeypatch.setattr(Demo, stage, lambda self, *args: None)
    out = tmp_path / "out"
    Demo(out, [text], seed=3, settings=TINY).run()
    (out / "onnx").mkdir()
    (out / "onnx" / "stale").touch()
    (out / "comparison.json").touch()
    (out / "notes.txt").write_text("mine")
    Demo(out, [out / "corpus" / "train.txt"], seed=3, settings=TINY).run()  # reads its data before clearing
    assert not (out / "onnx").exists()
    assert not (out / "comparison.json").exists()
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("stage", ["gpt2-base", "gpt2-tuned", "dmpt", "export"])
def test_a_stopped_demo_goes_on_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, made: Path, stage: str
) -> None:
    from dmpt_export.onnx import export
    from training.loop.trainer import Trainer

    steps: dict[str, int] = {}
    step, export_onnx = Trainer.step, export.export_onnx

    def counted(self: Trainer) -> float:
        name = self.out.name
        steps[name] = steps.get(name, 0) + 1
        if (name, steps[name]) == (stage, 2):
            signal.raise_signal(signal.SIGINT)
        return step(self)

    def stopped(source: Path, out: Path) -> None:
        if out.name == "dmpt-fp32" and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt
        return export_onnx(source, out)

    monkeypatch.setattr(Trainer, "step", counted)
    if stage == "export":
        monkeypatch.setattr(export, "export_onnx", stopped)
    monkeypatch.setattr(Demo, "generate", lambda self, *args: None)
    monkeypatch.setattr(Demo, "compare", lambda self, *args: None)
    with pytest.raises(KeyboardInterrupt):
        Demo(tmp_path / "out", [text], seed=3, settings=TINY).run()
    Demo(tmp_path / "out", [text], seed=3, settings=TINY).run()
    assert steps == {"gpt2-base": TINY.base_steps, "gpt2-tuned": TINY.tune_steps, "dmpt": TINY.tune_steps}
    for name in ("gpt2-tuned", "dmpt"):
        for room in (
            "checkpoints/{}/model.safetensors",
            "quantized/{}-int4/model.safetensors",
            "onnx/{}-int8/model.onnx",
        ):
            file = room.format(name)
            assert (tmp_path / "out" / file).read_bytes() == (made / file).read_bytes(), file


@pytest.mark.parametrize("change", ["seed", "settings", "text", "finished"])
def test_another_demo_does_not_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, change: str) -> None:
    def stopped(self: Demo) -> None:
        raise KeyboardInterrupt

    for name in ("train_models", "export", "generate", "compare"):
        monkeypatch.setattr(Demo, name, lambda self, *args: None)
    monkeypatch.setattr(Demo, "quantize", stopped)
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text(text.read_text() + "One more line of the mill by the river and the evening tide.\n")
    with pytest.raises(KeyboardInterrupt):
        Demo(out, [text], seed=3, settings=TINY).run()
    (out / "onnx").mkdir()
    monkeypatch.setattr(Demo, "quantize", lambda self: None)
    if change == "finished":
        Demo(out, [text], seed=3, settings=TINY).run()
        assert (out / "onnx").exists()
    settings = TINY.scaled(2) if change == "settings" else TINY
    Demo(out, [other if change == "text" else text], seed=4 if change == "seed" else 3, settings=settings).run()
    assert not (out / "onnx").exists()


def test_a_folder_that_is_no_demo_is_refused(tmp_path: Path, text: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="was not made by `dmpt-export demo`"):
        Demo(tmp_path, [text], seed=0, settings=TINY).run()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        Demo(text, [], seed=0, settings=TINY).run()


def test_the_command_passes_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path) -> None:
    seen: list[Demo] = []
    monkeypatch.setattr(Demo, "run", lambda self: seen.append(self))
    args = ["demo", "--out", str(tmp_path), "--data", str(text), "--seed", "9", "--scale", "0.5"]
    assert CliRunner().invoke(cli.cli, args).exit_code == 0
    assert (seen[0].out, seen[0].data, seen[0].seed) == (tmp_path, [text], 9)
    assert seen[0].settings == Settings().scaled(0.5)
    assert seen[0].settings.tune_steps == round(Settings().tune_steps / 2)


@pytest.mark.parametrize("scale", ["nan", "inf", "0"])
def test_a_scale_is_a_number(scale: str, tmp_path: Path) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--scale", scale]) == 2
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("\n".join(f"line {i}" for i in range(60)))
    with pytest.raises(InputError, match="more than 32 each are needed"):
        Demo(tmp_path / "out", [short], seed=0, settings=TINY).run()
    assert not (tmp_path / "out").exists()


def test_tokenizer_gives_every_text_back() -> None:
    tokenizer = train_tokenizer(["plain English text"] * 50, 300)
    for sample in ("plain text", "naïve 東京 \U0001f600", "tabs\tand\nlines", "  "):
        assert tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) == sample
    assert tokenizer.token_to_id(END_OF_TEXT) == 0


def test_opening_is_the_first_sentence_like_line() -> None:
    sentence = "Return the first of the words of this line, which is long enough."
    assert opening(f"def f(a)\nlower case line\n{sentence}\n") == "Return the first of the"
    assert opening("only this") == "only this"
