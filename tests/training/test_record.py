"""What a model was trained on travels with it: through phases, resuming, init, quantizing and export."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

import dmpt_export
from benchmarks.quality.scorer import record_of_source
from tests.helpers.models import random_model
from tests.helpers.training_runs import LENGTH, TOKENS, options, some_tokens
from training.checkpoints.checkpoint import load_model, save_model
from training.checkpoints.record import Phase, Record, fingerprint, record_of
from training.loop import trainer
from training.loop.evaluation import Evaluation
from training.loop.trainer import train
from training.model.init import init_from_gpt2
from training.model.new_shape import NewShape

pytestmark = pytest.mark.usefixtures("one_thread")


def test_phases_add_up_and_keep_their_base(tmp_path: Path) -> None:
    model = random_model([], 1)
    base = fingerprint(model.named_parameters())
    train(model, TOKENS, options(max_steps=2), tmp_path / "first")
    again = load_model(tmp_path / "first")
    train(again, some_tokens(400, 3), options(max_steps=3, seed=5), tmp_path / "second", some_tokens(300, 1))
    for folder in (tmp_path / "second", tmp_path / "second" / "last"):
        found = record_of_source(folder)
        assert found is not None
        assert found.base == base
        first, second = found.phases
        assert (first.steps, first.tokens, first.length) == (2, 2 * 2 * 2 * LENGTH, LENGTH)
        assert (second.steps, second.seed) == (3, 5)
        assert second.data == f"{zlib.crc32(some_tokens(400, 3).data):08x}"
        assert found.tokens == first.tokens + second.tokens


def test_the_settings_that_decide_how_far_tokens_go_are_recorded(tmp_path: Path) -> None:
    chosen = options(max_steps=1, lr=3e-4, head_lr=2e-4, gate_lr=1e-4, lr_schedule="cosine", dropout=0.2)
    common = {
        "lr": 3e-4, "lr_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "dropout": 0.2,
        "step_tokens": 2 * 2 * LENGTH,
    }  # fmt: skip
    train(random_model([], 1), TOKENS, chosen, tmp_path / "gpt2")  # has neither gates nor a head beside the embedding
    train(random_model([2], 4), TOKENS, chosen, tmp_path / "dmpt")
    gpt2, dmpt = (record_of_source(tmp_path / name) for name in ("gpt2", "dmpt"))
    assert gpt2 is not None
    assert dmpt is not None
    assert gpt2.phases[0].settings == common
    assert dmpt.phases[0].settings == common | {"head_lr": 2e-4, "gate_lr": 1e-4}


def test_the_best_of_a_finished_run_records_the_length_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.7, 1.9])  # the best after step 2 of 4, then after step 5 of 5
    monkeypatch.setattr(trainer, "evaluate", lambda *_: Evaluation(loss=next(losses), accuracy=0.1, tokens=100))
    out, held_out, step = tmp_path / "run", some_tokens(300, 1), 2 * 2 * LENGTH
    train(random_model([], 1), TOKENS, options(max_steps=4, eval_every=1), out, held_out)
    assert phases(out) == phases(out / "best") == [(2 * step, 4 * step)]
    assert phases(out / "last") == [(4 * step, None)]  # not chosen
    train(load_model(out / "last"), TOKENS, options(max_steps=5, eval_every=1), out, held_out, resume=True)
    assert phases(out) == [(5 * step, 5 * step)]
    model = load_model(out)
    train(model, TOKENS, options(max_steps=1), tmp_path / "further")
    assert phases(tmp_path / "further") == [(5 * step, 5 * step), (step, None)]


def phases(folder: Path) -> list[tuple[int, int | None]]:
    found = record_of_source(folder)
    assert found is not None
    return [(phase.tokens, phase.best_of) for phase in found.phases]


def test_a_record_without_settings_is_read() -> None:
    old = {"tokens": 10, "steps": 1, "operations": 1.0, "seed": 0, "data": "d", "length": 5}
    assert Record.from_json({"base": "b", "phases": [old]}) == Record("b", (Phase(10, 1, 1.0, 0, "d", 5),))


def test_a_resumed_run_is_one_phase(tmp_path: Path) -> None:
    train(random_model([], 1), TOKENS, options(max_steps=4), tmp_path / "whole")
    train(random_model([], 1), TOKENS, options(max_steps=2), tmp_path / "parts")
    train(load_model(tmp_path / "parts" / "last"), TOKENS, options(max_steps=4), tmp_path / "parts", resume=True)
    assert record_of_source(tmp_path / "parts") == record_of_source(tmp_path / "whole")


def test_a_dmpt_has_the_base_of_the_gpt2_it_was_made_from(tmp_path: Path) -> None:
    gpt2 = random_model([], 1)
    fresh = init_from_gpt2(gpt2, NewShape([2], None, 4))
    assert record_of(fresh.config, fresh.named_parameters()) == Record(fingerprint(gpt2.named_parameters()))
    train(gpt2, TOKENS, options(max_steps=2), tmp_path / "gpt2")
    dmpt = init_from_gpt2(load_model(tmp_path / "gpt2"), NewShape([2], None, 4))
    train(dmpt, TOKENS, options(max_steps=1), tmp_path / "dmpt")
    mine, its = record_of_source(tmp_path / "dmpt"), record_of_source(tmp_path / "gpt2")
    assert mine is not None
    assert its is not None
    assert mine.base == its.base
    assert mine.phases[:1] == its.phases
    assert len(mine.phases) == 2


def test_artefacts_carry_it(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = load_model(tiny_gpt2)
    save_model(model, tmp_path / "plain", tokenizer_from=tiny_gpt2)
    assert record_of_source(tmp_path / "plain") is None
    train(model, np.arange(300, dtype=np.int32), options(max_steps=1, max_length=16), tmp_path / "tuned")
    dmpt_export.quantize(tmp_path / "tuned", tmp_path / "small", scheme="int8")
    dmpt_export.export(tmp_path / "small", tmp_path / "device")
    found = [record_of_source(tmp_path / name) for name in ("tuned", "small", "device")]
    assert found[0] is not None
    assert found == [found[0]] * 3


@pytest.mark.parametrize("value", [None, 3, {}, {"base": "x"}, {"base": "x", "phases": [{"tokens": 1}]}])
def test_what_is_not_a_record_counts_as_none(value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"training": value}))
    assert record_of_source(tmp_path) is None
