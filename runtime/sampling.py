"""Choosing the next token from log-probabilities: repetition penalty, temperature, top-k, top-p, a seeded draw.

The order and the meaning are those of the common tools: penalty, temperature, top-k, top-p. Because the
model hands out log-probabilities (never above 0) and not logits, the repetition penalty always multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ModelError, RequestError

Scores = NDArray[np.float32]  # [vocab], log-probabilities


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; raises RequestError, naming the value, for one that cannot be.

    temperature: 0 takes the likeliest token (the lowest id among equals); None means 1 when top_k, top_p
    or seed asks for a random choice, else 0.
    """

    temperature: float | None = None
    top_k: int | None = None  # keep the k likeliest tokens, and those equal to the last of them
    top_p: float | None = None  # keep the fewest likeliest tokens whose probabilities reach p
    repetition_penalty: float = 1.0  # above 1 makes tokens of the prompt and the text so far less likely
    seed: int | None = None  # None: a different text each time

    def __post_init__(self) -> None:
        if self.temperature is not None and not (is_number(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature {self.temperature!r} must be a number, 0 (the likeliest token) or above")
        if self.top_k is not None and not (is_whole(self.top_k) and self.top_k >= 1):
            raise RequestError(f"top_k {self.top_k!r} must be a whole number, 1 or above")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise RequestError(f"top_p {self.top_p!r} must be a number above 0, at most 1")
        if not (is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise RequestError(f"repetition_penalty {self.repetition_penalty!r} must be a number above 0 (1: none)")
        if self.seed is not None and not (is_whole(self.seed) and self.seed >= 0):
            raise RequestError(f"seed {self.seed!r} must be a whole number, 0 or above")

    @property
    def heat(self) -> float:
        """The temperature after the rule for None."""
        if self.temperature is not None:
            return float(self.temperature)
        return 0.0 if self.top_k is None and self.top_p is None and self.seed is None else 1.0


def is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return (is_whole(value) or isinstance(value, (float, np.floating))) and math.isfinite(value)  # type: ignore[arg-type]


class Sampler:
    """Draws tokens one after the other; equal seeds and equal log-probabilities give equal tokens."""

    def __init__(self, sampling: Sampling, seen: Iterable[int] = ()) -> None:
        """seen: token ids of the prompt, for the repetition penalty."""
        self.sampling = sampling
        self.heat = sampling.heat
        self.rng = np.random.default_rng(sampling.seed)
        self.seen = dict.fromkeys(seen) if sampling.repetition_penalty != 1 else {}  # ordered, for stable arithmetic

    def __call__(self, log_probs: Scores) -> int:
        """The next token id. `log_probs` [vocab] is left as it is. Raises ModelError when it holds NaN."""
        scores = self.penalise(log_probs)
        best = int(scores.argmax())  # of the first NaN, if there is one
        if math.isnan(scores[best]):
            raise ModelError("the model returned NaN instead of log-probabilities: export it again and check it")
        token = best if self.heat == 0 else self.draw(scores)
        if self.sampling.repetition_penalty != 1:
            self.seen[token] = None
        return token

    def penalise(self, log_probs: Scores) -> Scores:
        if not self.seen:
            return log_probs
        scores = log_probs.copy()
        scores[np.fromiter(self.seen, np.int64)] *= self.sampling.repetition_penalty
        return scores

    def draw(self, scores: Scores) -> int:
        tokens, probs = nucleus(*keep_top_k(scores, self.sampling.top_k, self.heat), self.sampling.top_p)
        ends = probs.cumsum()
        drawn = ends.searchsorted(self.rng.random() * ends[-1], side="right")
        at = min(int(drawn), len(ends) - 1)  # rounding can put the draw on the very end
        return int(tokens[at])


def keep_top_k(scores: Scores, k: int | None, temperature: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids ascending, probabilities at the temperature) of the k likeliest tokens; equals of the last one stay."""
    if k is not None and k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    else:
        tokens = np.arange(len(scores))
    kept = scores[tokens].astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature next to 0 leaves only the likeliest
        probs = np.exp((kept - kept.max()) / temperature)
    return tokens, probs / probs.sum()


def nucleus(
    tokens: NDArray[np.int64], probs: NDArray[np.float64], p: float | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The fewest likeliest tokens whose probabilities add up to at least p; lower ids first among equals."""
    if p is None or p >= 1:
        return tokens, probs
    # All tokens below (1 - p) / n together weigh less than 1 - p, so the rest already holds the answer:
    # sorting those few instead of the whole vocabulary is twenty times faster.
    likely = np.flatnonzero(probs >= (1 - p) / len(probs))
    order = likely[np.argsort(-probs[likely], kind="stable")]
    enough = int(np.searchsorted(np.cumsum(probs[order]), p)) + 1
    kept = np.sort(order[:enough])
    return tokens[kept], probs[kept]
