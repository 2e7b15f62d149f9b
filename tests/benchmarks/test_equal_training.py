"""A comparison counts models as equally trained only where that is recorded, and names what differed all the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.comparison.equal_training import training_notes
from benchmarks.comparison.findings import reading
from benchmarks.comparison.result import Comparison
from tests.helpers.rows import DMPT, TUNED
from training.checkpoints.record import Phase, Record

SETTINGS = {"lr": 2e-5, "warmup_steps": 1000}


def phase(tokens: int, data: str = "d", **more: Any) -> Phase:
    return Phase(tokens, 10, 1e9, 0, data, 64, **more)


def trained(tokens: int, base: str = "b", data: str = "d") -> Record:
    return Record(base, (phase(tokens, data),))


def read(mine: Record | None, its: Record | None) -> str:
    return reading([replace(TUNED[0], training=its), replace(DMPT[0], training=mine)])


def notes(mine: Record | None, its: Record | None) -> list[str]:
    return training_notes([replace(TUNED[0], training=its), replace(DMPT[0], training=mine)])


# --- equal tokens -----------------------------------------------------------------------------------


def test_equal_tokens_of_one_text_and_base() -> None:
    alike = read(trained(4000), trained(4000))
    assert "DMPT against GPT-2 trained on the same 4,000 tokens, at the same scheme: fp32: perplexity 4.00 %" in alike
    assert read(trained(4000), Record("b", 2 * trained(2000).phases)).count("4,000 tokens") == 1  # in two runs


@pytest.mark.parametrize(
    ("its", "why"),
    [
        (trained(16_000), "DMPT fp32 was trained on 4,000 tokens, GPT-2 fine-tuned fp32 on 16,000 tokens"),
        (trained(4000, "c"), "DMPT fp32 and GPT-2 fine-tuned fp32 were trained from different models"),
        (trained(4000, data="e"), "DMPT fp32 and GPT-2 fine-tuned fp32 were trained on different text"),
    ],
)
def test_unequal_training_gets_no_verdict(its: Record, why: str) -> None:
    said = read(trained(4000), its)
    assert f"no verdict ({why})" in said
    assert "4.00 %" not in said
    assert "same" not in said.split("scheme: ")[1]


@pytest.mark.parametrize("unknown", [None, Record("b")])
def test_training_that_is_not_recorded(unknown: Record | None) -> None:
    said = read(trained(4000), unknown)
    assert "DMPT against the control, at the same scheme" in said
    assert "equal training not recorded" in said
    assert notes(trained(4000), unknown) == []


# --- the best step of a run -------------------------------------------------------------------------


def best(tokens: int, of: int | None, **more: Any) -> Record:
    return Record("b", (phase(tokens, best_of=of, **more),))


def test_the_best_steps_of_equally_long_runs_count_as_equal() -> None:
    said = read(best(1500, 4000), best(2500, 4000))
    assert "GPT-2 from a run over the same 4,000 tokens (each at its best step on held-out text), at the" in said
    assert "perplexity 4.00 %" in said
    assert notes(best(1500, 4000), best(2500, 4000)) == [
        "DMPT fp32: the best step on held-out text, after 1,500 of 4,000 tokens; the control's is after 2,500."
    ]
    assert notes(best(1500, 4000), best(1500, 4000)) == []


@pytest.mark.parametrize(
    ("its", "amount"),
    [
        (best(2500, 8000), "2,500 tokens, the best of 8,000"),  # a longer run
        (best(4000, None), "4,000 tokens"),  # its last step, which held-out text did not choose
        (best(2500, None), "2,500 tokens"),  # an unfinished run, or a record without its length
    ],
)
def test_a_best_step_beside_any_other_gets_no_verdict(its: Record, amount: str) -> None:
    said = read(best(1500, 4000), its)
    assert "no verdict (DMPT fp32 was trained on 1,500 tokens, the best of 4,000, " in said
    assert f"GPT-2 fine-tuned fp32 on {amount})" in said
    assert "4.00 %" not in said


def test_the_best_steps_of_runs_on_different_text_get_no_verdict() -> None:
    other = Record("b", (phase(2500, "e", best_of=4000),))
    assert "no verdict" in read(best(1500, 4000), other)


def test_a_shared_earlier_run_does_not_hide_the_best_step() -> None:
    shared = phase(9000)
    mine, its = (Record("b", (shared, *best(tokens, 4000).phases)) for tokens in (1500, 2500))
    assert "from a run over the same 13,000 tokens" in read(mine, its)
    longer = Record("b", (phase(9500), *its.phases[1:]))
    assert "no verdict" in read(mine, longer)


# --- settings ---------------------------------------------------------------------------------------


def set_to(**changes: Any) -> Record:
    return Record("b", (phase(4000, settings=SETTINGS | changes),))


def test_other_learning_rates_are_named_and_equal_tokens_stay_equal() -> None:
    mine, its = set_to(lr=6e-4, gate_lr=1e-5), set_to()
    assert "trained on the same 4,000 tokens" in read(mine, its)
    assert notes(mine, its) == [
        "DMPT fp32: trained with other settings than the control: lr 0.0006 (control 2e-05)."
    ]  # gate_lr is the DMPT's own
    assert notes(set_to(gate_lr=1e-5), its) == []


def test_one_line_names_all_rows_of_a_difference_and_reaches_the_table() -> None:
    mine, its = set_to(warmup_steps=0), set_to()
    rows = [*(replace(row, training=its) for row in TUNED), *(replace(row, training=mine) for row in DMPT)]
    line = (
        "DMPT fp32, DMPT int8, DMPT int4: trained with other settings than the control: warmup steps 0 (control 1000)."
    )
    assert training_notes(rows) == [line]
    assert line in Comparison(rows, [], []).notes()


def test_settings_that_only_one_record_has_are_not_compared() -> None:
    assert notes(set_to(lr=6e-4), trained(4000)) == []
    assert "trained on the same 4,000 tokens" in read(set_to(lr=6e-4), trained(4000))


def test_the_same_tokens_in_more_runs_are_named() -> None:
    halves = Record("b", 2 * (phase(2000, settings=SETTINGS),))
    assert notes(halves, set_to()) == ["DMPT fp32: trained with other settings than the control: 2 runs (control 1)."]


def test_other_lengths_of_sequences_are_named() -> None:
    short = Record("b", (replace(set_to().phases[0], length=16),))
    assert notes(short, set_to())[0].endswith(": length 16 (control 64).")
