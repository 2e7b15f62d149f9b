"""The evidence driver: its arithmetic by hand, its slices, and one pass through the real command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import plan, report, training
from benchmarks.evidence.corpus import slices
from benchmarks.evidence.plan import SCALES, VARIANTS
from tests.helpers.models import random_model
from tests.helpers.paths import REPOSITORY
from training.errors import InputError
from training.loop.objective import Objective
from training.loop.options import TrainOptions
from training.text.windows import train_tokenizer

CPU = SCALES["cpu"]


def test_flops_by_hand() -> None:
    block, head = 24 * 128**2 + 2 * 256 * 128, 2 * 4096 * 128
    for name, blocks, heads in (("gpt2", 4, 1), ("multi-head", 4, 4), ("dual", 6, 2), ("dual-heads", 6, 8)):
        assert plan.flops_per_token(VARIANTS[name], CPU) == blocks * block + heads * head
    rows, small = 2 * 64 * 128, 2 * 128 * 128  # candidates of a head, a projection
    projected = {"dual-projected": 2 * head + 6 * rows + 6 * small, "dual-one-anchor": 2 * head + 6 * rows + 7 * small}
    for name, heads in projected.items():
        assert plan.flops_per_token(VARIANTS[name], CPU) == 6 * block + heads
    assert plan.flops_per_token(VARIANTS["quad"], CPU) == (2 + 2 * 1 + 4 * 1) * block + 4 * head


def test_equal_tokens_or_equal_operations() -> None:
    flops = {name: plan.flops_per_token(variant, CPU) for name, variant in VARIANTS.items()}
    for name, variant in VARIANTS.items():
        steps = plan.steps_of(variant, CPU)
        if variant.flops_of:
            assert steps * flops[name] == pytest.approx(CPU.tune_steps * flops[variant.flops_of], rel=0.005)
        else:
            assert steps == (CPU.tune_steps if variant.tuned else 0)
    assert VARIANTS["base"].plain
    assert VARIANTS["gpt2"].plain
    assert not VARIANTS["multi-head"].plain


def test_every_variant_is_given_the_same_settings_but_for_what_it_adds() -> None:
    def options(name: str) -> dict[str, str]:
        given = " ".join(plan.train_options(VARIANTS[name], CPU, 0, 10, 1e-3))
        pairs = [option.split() for option in given.split("--")[1:]]
        return {name.replace("-", "_"): value[0] if value else "True" for name, *value in pairs}

    gpt2, dual = options("gpt2"), options("dual-heads")
    assert gpt2.items() - dual.items() == {("head_lr", "0.001")}
    assert dual["head_lr"] == "0.003"
    assert dual.keys() - gpt2.keys() == {*plan.DMPT, *plan.PATHS, "fast_k", "fast_k_loss"}
    assert "fast_k_loss" not in options("dual")
    assert "fast_k_loss" not in options("multi-head-full")
    assert dual.keys() <= TrainOptions.__dataclass_fields__.keys()


def test_measurements_of_a_variant() -> None:
    assert plan.evaluations(VARIANTS["gpt2"], CPU) == [("gate_hard", 0)]
    assert plan.evaluations(VARIANTS["multi-head"], CPU) == [("gate_hard", 64), ("gate_hard", 0)]
    assert plan.evaluations(VARIANTS["dual-heads"], CPU, controls=False) == [("gate_hard", 64)]
    assert [m for m, _ in plan.evaluations(VARIANTS["quad"], CPU)] == ["gate_hard", "random", "gate_soft"]
    dual = [m for m, _ in plan.evaluations(VARIANTS["dual"], CPU)]
    assert dual == ["gate_hard", "random", "gate_soft", "left_only", "right_only"]


def test_slices_are_consecutive_and_do_not_overlap(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text("aaa\n\n bbb \nccc\nddd\neee\n")
    assert slices(source, [5, 4]) == [["aaa", "bbb"], ["ccc"]]
    assert slices(source, [8, 100]) == [["aaa", "bbb"], ["ccc", "ddd", "eee"]]
    assert slices(source, [100, 100])[1] == []


def test_the_tokenizer_knows_every_byte() -> None:
    tokenizer = train_tokenizer(["the cat and the hat and the bat"] * 5, 270)
    assert tokenizer.get_vocab_size() <= 270
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    text = "the naïve cat 猫"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_nats_per_byte_and_word_by_hand(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("ab cd\n\n e\n")  # 6 + 2 bytes, 3 + 2 words with the line ends
    found = report.per_byte_and_word({"mean_nll": 2.0, "tokens": 10, "tokens_scored": 4}, text)
    assert found["bits_per_byte"] == pytest.approx(20 / 8 / math.log(2))
    assert found["word_perplexity"] == pytest.approx(math.exp(20 / 5))


def test_touched_parameters_are_those_of_the_measurement() -> None:
    def touched(deployed: int | None, fast_k: int) -> int:
        rows = deployed or 100
        shape = {
            "config": {"vocab_size": 100, "n_embd": 8, "fast_k": deployed},
            "head_allocation": {"left": [0, 1, 2], "right": [3, 4, 5]},
            "parameters": {"total": 5000, "touched_per_token": 1000 + 100 * 8 + 2 * rows * 8},
        }
        return report.parameters(shape, fast_k)["touched_per_token"]

    for deployed in (None, 10, 20):
        assert touched(deployed, 0) == 1000 + 3 * 100 * 8
        assert touched(deployed, 10) == 1000 + 100 * 8 + 2 * 10 * 8


def test_training_with_random_routing_is_refused() -> None:
    with pytest.raises(InputError, match="evaluation only"):
        Objective(random_model([2], 2), TrainOptions(train_path_selection="random"))


def test_controls_are_held_against_the_same_seeds() -> None:
    line = {"variant": "dual", "seed": 0, "mode": "gate_hard", "deployed": True, "perplexity": 10.0}
    line["route_shares"] = {"left": 0.25, "right": 0.75}
    control = {**line, "mode": "random", "perplexity": 12.0}
    found = report._controls([line, {**line, "seed": 1, "perplexity": 30.0}], [control]).splitlines()[-1]
    assert [cell.strip() for cell in found.strip("|").split("|")] == ["dual", "10.00", "12.00", "25/75"]


def test_a_folder_of_another_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        training.claim(tmp_path / "new", SCALES["toy"])  # the same again is taken
    (tmp_path / "old" / "runs").mkdir(parents=True)  # made before plans were stored
    for folder, scale in (("new", "cpu"), ("old", "toy")):
        with pytest.raises(SystemExit, match="holds runs of a different plan: give another folder"):
            training.claim(tmp_path / folder, SCALES[scale])
    monkeypatch.setattr(plan, "BASE_LR", 1.0)
    with pytest.raises(SystemExit, match="a different plan"):
        training.claim(tmp_path / "new", SCALES["toy"])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    import lzma

    lines = [f"the {a} of the {b} was in the {c} city ." for a in "abcdefgh" for b in "ijklmno" for c in "pqrst"]
    text = "\n".join(lines * 4) + "\n"
    for name in ("enwiki/train.txt.xz", "wikitext/wiki2.train.unk.txt.xz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lzma.compress(text.encode(), preset=0))
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        (tmp_path / "wikitext" / name).write_text("\n".join(lines[:40]) + "\n")
    return tmp_path


def test_one_command_trains_measures_and_skips_what_is_done(texts: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"

    def run(variants: str, *more: str) -> list[dict[str, Any]]:
        command = ["--data", str(texts), "--work", str(work), "--scale", "toy", "--variants", variants, *more]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.evidence.training", *command],
            cwd=REPOSITORY, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == (work / "results.md").read_text()
        return [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]

    lines = run("base,dual")
    assert [(x["variant"], x["mode"]) for x in lines][:2] == [("base", "gate_hard"), ("dual", "gate_hard")]
    assert len(lines) == 6
    assert all(1 < x["perplexity"] < 500 for x in lines)
    base, dual = lines[:2]
    assert base["tokens_tuned"] == 0
    assert dual["tokens_tuned"] == 6 * 4 * 32
    assert dual["parameters"] > dual["touched_per_token"] > base["touched_per_token"]
    assert run("base,dual") == lines
    more = run("gpt2 lr x2", "--trials", "2")
    assert more[:-1] == lines
    assert more[-1]["mode"] == "trial"
