"""The lines under a comparison's table; they never claim more than was measured."""

from __future__ import annotations

import math
from dataclasses import replace

from benchmarks.comparison.findings import reading
from benchmarks.comparison.ranking import rankings
from benchmarks.comparison.result import Comparison
from benchmarks.report.page import page
from tests.helpers.rows import BASE, DMPT, TUNED, quality, row


def test_dmpt_is_read_against_its_control_of_the_same_scheme() -> None:
    said = reading([BASE, *TUNED, *DMPT])
    assert "\n" not in said
    fp32, int8, int4 = said.split("scheme: ")[1].split(" (± two")[0].split("; ")
    assert "perplexity 4.00 % ± 0." in fp32
    assert "lower, 3.00x the size, 0.80x the decode speed" in fp32
    assert "perplexity 5.88 % ± 0." in int8
    assert "higher, 2.50x the size, 0.75x" in int8
    assert "perplexity no different (+0.02 % ±" in int4
    assert "1.10x the decode speed" in int4


def test_the_margin_is_two_paired_standard_errors() -> None:
    said = reading([TUNED[0], DMPT[0]])
    assert TUNED[0].quality
    assert DMPT[0].quality
    difference = DMPT[0].quality.nll - TUNED[0].quality.nll
    margin = 100 * 2 * difference.std(ddof=1) / math.sqrt(4000) * 48 / 50
    assert f"± {margin:.2f} %" in said
    assert margin < 1  # unpaired it would be ten times as much: what makes tokens hard cancels


def test_no_claim_without_a_control() -> None:
    said = reading([BASE, *DMPT])
    assert "control is missing" in said
    assert "%" not in said
    assert "x the" not in said
    said = reading([TUNED[0], TUNED[2], *DMPT[:2]])
    assert said.endswith(
        "; int8: no verdict (stored as int8, but GPT-2 fine-tuned fp32 as fp32, GPT-2 fine-tuned int4 as int4) "
        "(± two paired standard errors over tokens; other training runs may differ)."
    )
    assert "x the" not in said.split("int8: ")[1]
    assert "None of these models is a DMPT" in reading([BASE, *TUNED])


def test_a_control_that_is_a_checkpoint_has_no_speed_to_compare() -> None:
    checkpoint = replace(TUNED[0], kind="float", speed=None)
    assert "3.00x the size, no decode speed (GPT-2 fine-tuned fp32 is a checkpoint: export it to time it)" in reading(
        [checkpoint, DMPT[0]]
    )
    assert "checkpoint" not in reading([TUNED[0], DMPT[0]])
    assert "checkpoint" not in reading([checkpoint, replace(DMPT[0], kind="float", speed=None)])  # neither is timed


def test_a_part_of_the_table_has_no_reading() -> None:
    said = Comparison([TUNED[0]], ["text"], [], unscored=["DMPT fp32", "other"]).reading
    assert said.startswith("Not scored when stopped: DMPT fp32, other.")
    assert "None of these" not in said


def test_best_trade_offs_are_named() -> None:
    worse = row("worse", "fp32", 70, 58, 50)
    assert (
        "Best trade-offs of perplexity, decode time and size: GPT-2 fine-tuned fp32, DMPT fp32. For each other timed "
        "model, one of these is at least as good in all three."
    ) in Comparison([TUNED[0], DMPT[0], worse], ["text"], []).notes()
    untimed = row("untimed", "fp32", 1, 10, None)
    assert "Best trade-offs of perplexity, decode time and size: GPT-2 fine-tuned fp32, DMPT fp32." in (
        Comparison([TUNED[0], DMPT[0], untimed], ["text"], []).notes()
    )


def test_other_tokens_do_not_compare() -> None:
    other = replace(TUNED[0], quality=quality(50, text="another"))
    assert "do not compare" in reading([other, DMPT[0]])


def test_other_tokenizers_are_ranked_by_bytes() -> None:
    """Half as many tokens for the same text: twice the loss of each is no worse."""
    coarse = replace(TUNED[0], name="coarse", quality=quality(200, text="another", n_bytes=32_000))
    rows = [TUNED[0], DMPT[0], coarse]  # perplexities 50, 48, 200
    assert rankings(rows)["bits per byte"] == ["coarse", "DMPT fp32", "GPT-2 fine-tuned fp32"]
    assert "perplexity" not in rankings(rows)
    assert rankings(rows[:2])["perplexity"][0] == "DMPT fp32"
    result = Comparison(rows, ["text"], [])
    header, _, line = result.table().splitlines()[:3]
    assert "| word perplexity | bits per byte |" in header
    assert "accuracy" not in header
    assert line.split("|")[5:7] == [f"{math.exp(math.log(50) * 4 / 3):16.2f} ", f"{math.log2(50) / 4:14.4f} "]
    text = result.as_markdown()
    assert "perplexities per token do not compare" in text
    assert "Best first by bits per byte: coarse" in text
    assert "Best trade-offs of bits per byte, decode time and size: " in text
    assert "Size, bits per byte and speed" in (drawn := page(result))
    assert "Size, perplexity" not in drawn
    assert "coarse: 20 MB, bits per byte 0.9555" in drawn
    assert "They scored 16,000 to 32,000 bytes" in text  # the note on stride-concat


def test_without_text_or_speed_only_what_is_known_is_said() -> None:
    untimed = replace(row("GPT-2 fine-tuned", "fp32", 20, None, None), kind="onnx")
    said = reading([untimed, row("DMPT", "fp32", 60, None, 80)])
    assert said.endswith("fp32: 3.00x the size.")
