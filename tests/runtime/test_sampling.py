"""Compare sampling with slow references that follow the definitions literally."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ModelError, RequestError
from runtime.sampling import Sampler, Sampling, index_at, keep_top_k, nucleus


def log_probs(weights: list[float]) -> np.ndarray:
    return np.log(np.array(weights) / sum(weights)).astype(np.float32)


def slow_top_k(scores: np.ndarray, k: int) -> list[int]:
    """Tokens beaten by fewer than k others."""
    return [t for t in range(len(scores)) if sum(other > scores[t] for other in scores) < k]


def slow_nucleus(weights: list[int], p: Fraction) -> list[int]:
    """Take the heaviest remaining token, the lowest id on ties, until the share is reached; exact arithmetic."""
    rest, taken = list(range(len(weights))), []
    while sum(weights[t] for t in taken) < p * sum(weights):
        best = max(rest, key=lambda t: (weights[t], -t))
        rest.remove(best)
        taken.append(best)
    return sorted(taken)


@given(st.lists(st.sampled_from([-5.0, -2.5, -1.0, -0.5, -9.0]), min_size=1, max_size=20), st.integers(1, 25))
def test_top_k_keeps_what_fewer_than_k_beat(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32)
    tokens, weights = keep_top_k(scores, k, 0.5)
    assert tokens.tolist() == slow_top_k(scores, k)
    np.testing.assert_allclose(weights, [math.exp((v - max(values)) / 0.5) for v in scores[tokens]], rtol=1e-6)


@given(
    st.lists(st.integers(0, 64), min_size=1, max_size=30).filter(any),
    st.integers(1, 1023).map(lambda n: Fraction(n, 1024)),
)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(weights: list[int], p: Fraction) -> None:
    # small integers over a power of two: float32 and float64 sums are exact, so the boundary is too
    tokens, kept = nucleus(np.arange(len(weights)), np.array(weights, np.float32), float(p))
    assert tokens.tolist() == slow_nucleus(weights, p)
    assert kept.tolist() == [weights[t] for t in tokens]


@given(st.lists(st.integers(0, 64), min_size=1, max_size=60).filter(any), st.integers(0, 1023))
def test_a_draw_is_where_the_running_sum_passes(weights: list[int], share: int) -> None:
    # small integers over a power of two: all sums are exact
    want = next(i for i in range(len(weights)) if sum(weights[: i + 1]) * 1024 > share * sum(weights))
    assert index_at(np.array(weights, np.float32), share / 1024) == want


def test_top_p_at_gpt2_size_matches_a_full_sort() -> None:
    weights = np.random.default_rng(3).dirichlet(np.full(50257, 0.05)).astype(np.float32)
    tokens, _ = nucleus(np.arange(50257), weights, 0.9)
    order = np.argsort(-weights, kind="stable")
    enough = np.searchsorted(np.cumsum(weights[order], dtype=np.float64), 0.9 * weights.sum(dtype=np.float64)) + 1
    assert tokens.tolist() == sorted(order[:enough].tolist())
    assert 10 < len(tokens) < 20000


def test_the_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    scores = log_probs([1, 2, 3, 4])
    sampler, rng = Sampler(Sampling(seed=7)), np.random.default_rng(7)
    ends = [Fraction(1, 10), Fraction(3, 10), Fraction(6, 10), 1]
    for _ in range(200):
        u = rng.random()
        assert sampler(scores) == next(t for t, end in enumerate(ends) if u < end)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature: float) -> None:
    weights = [1.0, 2.0, 5.0]
    sampler = Sampler(Sampling(temperature=temperature, seed=11))
    drawn = [sampler(log_probs(weights)) for _ in range(4000)]
    want = np.array(weights) ** (1 / temperature)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, want / want.sum(), atol=0.03)


def test_greedy_takes_the_lowest_id_among_equals_and_ignores_the_seed() -> None:
    scores = log_probs([1, 3, 3, 2])
    assert [Sampler(Sampling(temperature=0, seed=s))(scores) for s in range(5)] == [1] * 5


def test_a_temperature_next_to_zero_is_greedy_without_warnings() -> None:
    assert Sampler(Sampling(temperature=1e-300, seed=1))(log_probs([1, 3, 2])) == 1


@pytest.mark.parametrize(
    ("options", "heat"),
    [
        ({}, 0),
        ({"seed": 1}, 1),
        ({"top_k": 3}, 1),
        ({"top_p": 0.5}, 1),
        ({"min_p": 0.1}, 1),
        ({"temperature": 0.0, "top_k": 3}, 0),
    ],
)
def test_without_a_temperature_any_sampling_option_means_one(options: dict[str, Any], heat: float) -> None:
    assert Sampling(**options).heat == heat


def test_repetition_penalty_multiplies_the_log_probs_of_prompt_and_text() -> None:
    scores = log_probs([8, 6, 5, 1])  # log-probs -0.92, -1.20, -1.39, -3.0
    sampler = Sampler(Sampling(repetition_penalty=1.4), seen=[0])
    assert sampler(scores) == 1  # token 0 falls to -1.28
    assert sampler(scores) == 0  # token 1 is now at -1.69, token 0 at -1.28
    before = scores.copy()
    sampler(scores)
    np.testing.assert_array_equal(scores, before)


def test_penalties_below_one_favour_what_was_seen() -> None:
    assert Sampler(Sampling(repetition_penalty=0.5), seen=[2])(log_probs([5, 4, 3])) == 2


def test_seeds_reproduce_and_differ() -> None:
    scores = log_probs(list(range(1, 50)))

    def text(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(scores) for _ in range(30)]

    assert text(5) == text(5) != text(6)
    assert text(None) != text(None)


def test_impossible_tokens_are_never_drawn() -> None:
    scores = np.array([-np.inf, math.log(0.5), -np.inf, math.log(0.5)], np.float32)
    sampler = Sampler(Sampling(temperature=5.0, seed=0))
    assert {sampler(scores) for _ in range(100)} == {1, 3}


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.49, 1), (0.5, 3), (np.nextafter(1, 0), 3)])
def test_draws_at_the_edges(u: float, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.array([-np.inf, math.log(0.5), -np.inf, math.log(0.5), -np.inf], np.float32)
    sampler = Sampler(Sampling(seed=0))
    monkeypatch.setattr(sampler, "rng", type("Fixed", (), {"random": lambda self: u})())
    assert sampler(scores) == token


@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"top_k": 2}, {"top_p": 0.5}])
def test_nan_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="NaN"):
        Sampler(Sampling(**options))(np.array([-1, np.nan, -2], np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", 1e300), ("top_k", 0), ("top_k", 2.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.1),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", True),
        ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", 1e39), ("seed", -1),
        ("seed", 1.5),
    ],
)  # fmt: skip
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        Sampling(**{name: value})
    assert caught.value.exit_code == 3
    assert repr(value) in str(caught.value)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.fractions(0, 1), st.sampled_from([0.5, 1.0, 2.0]))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(
    weights: list[int], share: Fraction, heat: float
) -> None:
    """Against the definition (Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024), at the temperature."""
    sampler = Sampler(Sampling(temperature=heat, min_p=float(share), seed=1))
    drawn = {sampler(log_probs(weights)) for _ in range(60)}
    odds = [(weight / max(weights)) ** (1 / heat) for weight in weights]
    assert all(odds[token] >= float(share) * (1 - 1e-5) for token in drawn)
    if share == 1:
        assert drawn <= {token for token, weight in enumerate(weights) if weight == max(weights)}


def test_min_p_changes_nothing_among_the_tokens_that_it_keeps() -> None:
    sampler = Sampler(Sampling(min_p=0.5, seed=3))
    drawn = np.bincount([sampler(log_probs([8, 5, 3, 4])) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, np.array([8, 5, 0, 4]) / 17, atol=0.03)


def test_a_bias_is_added_after_the_penalty() -> None:
    scores = log_probs([8, 6, 5, 1])
    assert Sampler(Sampling(logit_bias={3: 10.0}))(scores) == 3
    assert Sampler(Sampling(logit_bias={0: -100}))(scores) == 1
    # Token 0: -0.92 * 1.4 + 2 = 0.72, below token 1: -1.20 + 2.2 = 1.00. Bias first: (-0.92 + 2) * 1.4 = 1.52.
    sampler = Sampler(Sampling(logit_bias={0: 2.0, 1: 2.2}, repetition_penalty=1.4), seen=[0])
    assert sampler(scores) == 1
    odds = [float(np.exp(value)) for value in Sampler(Sampling(logit_bias={2: 1.0})).adjusted(scores)]
    assert odds == pytest.approx([8 / 20, 6 / 20, 5 / 20 * math.e, 1 / 20])
    np.testing.assert_array_equal(scores, log_probs([8, 6, 5, 1]))


@pytest.mark.parametrize(
    "bias", [{-1: 1.0}, {"7": 1.0}, {1.5: 1.0}, {True: 1.0}, {3: math.inf}, {3: "much"}, {3: 2e6}, [3], None]
)
def test_a_bias_must_map_ids_to_numbers(bias: Any) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        Sampling(logit_bias=bias)
