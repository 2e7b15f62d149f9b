"""Noise is named beside the numbers that it spoils."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.comparison.doubts import noise
from benchmarks.comparison.model_result import cells
from benchmarks.comparison.result import Comparison
from benchmarks.speed.cases import Case
from benchmarks.speed.noise import busy, drift, mark, scatter
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
    assert line == "Unsteady decode speeds (spread of the middle half of the rounds): DMPT int8 20%."
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


SCATTER = [1.0, 1.03, 0.98, 1.02, 0.97]  # of the rounds, whatever the machine does
SLOWER, FASTER, STEPPED = [1.0, 0.97, 0.92, 0.85, 0.82], [1.0, 1.04, 1.1, 1.15, 1.2], [1.0, 0.8, 0.81, 0.8, 0.81]


def timed(name: str, curve: list[float], prefill: list[float] | None = None, base: float = 100.0) -> Speed:
    """A model whose speed follows `curve` from round to round."""
    tests = [
        Timings(Case("pp", 8), [8 * base * c for c in prefill or curve]),
        Timings(Case("tg", 4, 8), [base * c for c in curve]),
    ]
    return Speed(name, tests, [0.1], 1, 1, 1, 1)


def scattered(curve: list[float]) -> list[float]:
    return [c * s for c, s in zip(curve, SCATTER, strict=True)]


def test_a_machine_that_slows_all_models_drifted() -> None:
    models = [timed("a", SLOWER, base=30.0), timed("b", scattered(SLOWER)), timed("c", scattered(SLOWER), SLOWER)]
    assert drift(models[:1]) == "the machine's speed drifted: the last rounds were 15% slower than the first"
    assert "% slower than the first" in (drift(models) or "")
    assert "% faster than the first" in (drift([timed("a", FASTER), timed("b", scattered(FASTER))]) or "")
    assert "slower" in (drift([timed("a", [1.0, 1.0, 0.99, 0.8, 0.8]), timed("b", SLOWER)]) or "")  # heat, at the end


@pytest.mark.parametrize(
    "curves",
    [
        [[1.0] * 5, [1.0] * 5],
        [SCATTER, SCATTER],
        [SLOWER, SCATTER],  # a model that slows down alone
        [SLOWER, FASTER],
        [[c**0.5 for c in SLOWER]] * 2,  # 8 % is within the limit
        [STEPPED] * 2,  # the first round alone was fast
        [[1.0, 1.0, 0.5, 1.0, 1.0]] * 2,
        [[1.0, 1.0, 1.0, 1.0, 0.5]] * 2,
        [[1.0, 0.8, 0.6]] * 2,  # too few rounds
        [],
    ],
)
def test_a_single_model_or_round_is_no_drift(curves: list[list[float]]) -> None:
    assert drift([timed(str(i), curve) for i, curve in enumerate(curves)]) is None


def test_a_drift_is_named_beside_the_numbers() -> None:
    models = [timed("a", SLOWER), timed("b", SLOWER)]
    assert as_text(models).endswith("; the machine's speed drifted: the last rounds were 15% slower than the first")
    assert "drifted" not in as_text([timed("a", SCATTER), timed("b", SLOWER)])
    rows = [replace(row(family, "int8", 4, 50, 100), speed=one) for family, one in zip("ab", models, strict=True)]
    assert (
        "The machine's speed drifted: the last rounds were 15% slower than the first; compare these speeds only with "
        "each other." in noise(rows)
    )
    steady = replace(row("c", "int8", 4, 50, 100), speed=timed("c", SCATTER))
    assert not any("drifted" in line for line in noise([*rows, steady]))
