"""Noise is named beside the numbers that it spoils."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.comparison.doubts import noise
from benchmarks.comparison.model_result import cells
from benchmarks.comparison.result import Comparison
from benchmarks.speed.cases import Case
from benchmarks.speed.noise import busy, mark, scatter
from benchmarks.speed.results import Speed, Timings
from dmpt_export.cli.bench import as_text, plus_minus
from tests.helpers.rows import row

STEADY, SCATTERED = [100.0, 101.0, 99.0, 100.5], [60.0, 100.0, 140.0, 100.0]


def speed(samples: list[float], load: float | None = None) -> Speed:
    tests = [Timings(Case("pp", 8), samples), Timings(Case("tg", 4, 8), samples)]
    return Speed("x", tests, [0.1], 1, 1, 1, 1, load_average=load)


def test_a_speed_that_scatters_is_marked_wherever_it_stands() -> None:
    assert mark(STEADY) == ""
    assert mark(SCATTERED) == " (unsteady)"
    assert plus_minus(speed(SCATTERED).first("tg")).endswith(" (unsteady)")
    assert cells(replace(row("DMPT", "int8", 4, 50, 100), speed=speed(SCATTERED)))["decode tokens/s"] == (
        "100.0 (unsteady)"
    )
    (line,) = noise([replace(row("DMPT", "int8", 4, 50, 100), speed=speed(SCATTERED))])
    assert line == "DMPT int8: the decode speed is unsteady; the middle half of its rounds spans 20% of the median."
    assert round(scatter(SCATTERED), 2) == 0.2
    assert noise([replace(row("DMPT", "int8", 4, 50, 100), speed=speed(STEADY))]) == []


def test_a_busy_machine_is_mentioned() -> None:
    assert busy(2.4, 2) is None
    assert busy(None, 2) is None
    assert busy(9.0, 2) == "the machine was busy: load 9.0 on 2 cores before timing began"
    assert "the machine was busy" in as_text([speed(STEADY, 1000.0)])
    assert "busy" not in as_text([speed(STEADY, 0.0)])
    (line,) = noise([replace(row("DMPT", "int8", 4, 50, 100), speed=speed(STEADY, 1000.0))])
    assert line.startswith("The machine was busy: load 1000.0 on ")
    assert line.endswith("repeat the timing on a quiet one.")


def test_equal_graphs_with_unequal_times_are_noticed() -> None:
    one = replace(row("GPT-2", "int8", 4, 50, 235), graph="g")
    other = replace(row("GPT-2 fine-tuned", "int8", 4, 50, 152), graph="g")
    lines = Comparison([one, other], [], []).notes()
    assert any("are the same graph but decoded at 235 and 152 tokens/s" in line and "55%" in line for line in lines)
    assert not any("same graph" in line for line in Comparison([one, replace(other, graph="h")], [], []).notes())
    near = replace(other, speed=one.speed)
    assert not any("same graph" in line for line in Comparison([one, near], [], []).notes())
