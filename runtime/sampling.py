"""Choose the next token from log-probabilities: penalty and bias, temperature, top-k, top-p, min-p, a seeded draw.

Order and meaning are those of the common tools: penalty, bias, temperature, top-k, top-p, min-p. The model returns
log-probabilities (never above 0), not logits, so the repetition penalty always multiplies.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ModelError, RequestError

Scores = NDArray[np.float32]  # [vocab] or fewer
Ids = NDArray[np.int64]
MOST = 1_000_000  # largest temperature and penalty: larger values would overflow float32
COLDEST = 1e-20  # lower temperatures act like 0 and would underflow in float32


class SamplingOptions(TypedDict, total=False):
    """The fields of Sampling, as keyword arguments."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int | None
    min_p: float | None
    logit_bias: Mapping[int, float]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises RequestError naming an invalid value.

    temperature: 0 takes the likeliest token (the lowest id on ties); None means 1 when top_k, top_p, min_p or seed is
    given, else 0.
    """

    temperature: float | None = None
    top_k: int | None = None  # keep the k likeliest tokens, and ties with the last of them
    top_p: float | None = None  # keep the smallest set of likeliest tokens whose probabilities reach p
    repetition_penalty: float = 1.0  # above 1 makes tokens of the prompt and the text so far less likely
    seed: int | None = None  # None: a different text each time
    min_p: float | None = None  # keep tokens at least this many times as likely as the likeliest
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the log-probs of token ids

    def __post_init__(self) -> None:
        if self.temperature is not None and not (is_number(self.temperature) and 0 <= self.temperature <= MOST):
            raise RequestError(
                f"temperature {self.temperature!r} must be a number from 0 (the likeliest token) to {MOST}"
            )
        if self.top_k is not None and not (is_whole(self.top_k) and self.top_k >= 1):
            raise RequestError(f"top_k {self.top_k!r} must be a whole number, 1 or above")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise RequestError(f"top_p {self.top_p!r} must be a number above 0, at most 1")
        if not (is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= MOST):
            raise RequestError(
                f"repetition_penalty {self.repetition_penalty!r} must be a number above 0 (1: none), at most {MOST}"
            )
        if self.min_p is not None and not (is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise RequestError(f"min_p {self.min_p!r} must be a number from 0 (keeps all tokens) to 1")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias {self.logit_bias!r} must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not (is_whole(token) and token >= 0 and is_number(bias) and abs(bias) <= MOST):
                raise RequestError(
                    f"logit_bias {token!r}: {bias!r} must be a token id and a number from -{MOST} (never) to {MOST}"
                )
        if self.seed is not None and not (is_whole(self.seed) and self.seed >= 0):
            raise RequestError(f"seed {self.seed!r} must be a whole number, 0 or above")

    @property
    def heat(self) -> float:
        """The temperature, with None resolved."""
        if self.temperature is not None:
            return float(self.temperature)
        draws = (self.top_k, self.top_p, self.min_p, self.seed)
        return 0.0 if all(option is None for option in draws) else 1.0

    def check_vocabulary(self, size: int) -> None:
        """Raise RequestError for a biased token that a vocabulary of this size lacks."""
        if beyond := [token for token in self.logit_bias if token >= size]:
            raise RequestError(f"logit_bias for token {beyond[0]}: this model's tokens are 0 to {size - 1}")

    def for_row(self, row: int) -> Sampling:
        """The settings of one prompt of a batch: its seed is the batch's seed plus its row."""
        return self if self.seed is None else replace(self, seed=self.seed + row)


def is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    number = is_whole(value) or isinstance(value, (float, np.floating))
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # math.isfinite() refuses huge ints


class Sampler:
    """Draws tokens one by one; equal seeds and equal log-probabilities give equal tokens."""

    def __init__(self, sampling: Sampling, seen: Iterable[int] = ()) -> None:
        """seen: token ids of the prompt, for the repetition penalty."""
        self.sampling = sampling
        self.heat = sampling.heat
        self.rng = np.random.default_rng(sampling.seed)
        self.biased = np.array([*sampling.logit_bias], np.int64)
        self.bias = np.array([*sampling.logit_bias.values()], np.float32)
        self.seen = dict.fromkeys(seen) if sampling.repetition_penalty != 1 else {}  # ordered, for stable arithmetic

    def __call__(self, log_probs: Scores) -> int:
        """The next token id. `log_probs` [vocab] is left unchanged. Raises ModelError when it holds NaN."""
        scores = self.adjusted(log_probs)
        best = int(scores.argmax())  # the first NaN, if there is one
        if math.isnan(scores[best]):
            raise ModelError("the model returned NaN instead of log-probabilities: export it again and check it")
        token = best if self.heat == 0 else self.draw(scores)
        if self.sampling.repetition_penalty != 1:
            self.seen[token] = None
        return token

    def adjusted(self, log_probs: Scores) -> Scores:
        """With penalty, then bias: a bias may raise log-probs above 0, where the penalty would do the opposite."""
        if not self.seen and not len(self.biased):
            return log_probs
        scores = log_probs.copy()
        scores[np.fromiter(self.seen, np.int64)] *= self.sampling.repetition_penalty
        scores[self.biased] += self.bias
        return scores

    def draw(self, scores: Scores) -> int:
        tokens, weights = nucleus(*keep_top_k(scores, self.sampling.top_k, self.heat), self.sampling.top_p)
        if self.sampling.min_p is not None:
            kept = weights >= np.float32(self.sampling.min_p)  # the largest weight is 1
            tokens, weights = tokens[kept], weights[kept]
        return int(tokens[index_at(weights, self.rng.random())])


def likeliest(log_probs: Scores, n: int) -> tuple[tuple[int, float], ...]:
    """(id, log-prob) of the n likeliest of the tokens [vocab], falling; lower ids first on ties.

    >>> likeliest(np.array([-3.0, -1.0, -2.0, -1.0], np.float32), 3)
    ((1, -1.0), (3, -1.0), (2, -2.0))
    """
    if n == 0:
        return ()
    tokens = np.flatnonzero(log_probs >= np.partition(log_probs, -n)[-n])
    falling = tokens[np.argsort(-log_probs[tokens], kind="stable")[:n]]
    return tuple(zip(falling.tolist(), log_probs[falling].tolist(), strict=True))


def index_at(weights: Scores, share: float) -> int:
    """The index where the running sum passes `share`, below 1, of the total.

    Sums whole stretches first: a running sum over the vocabulary would take several percent of a step.
    """
    width = max(1, math.isqrt(len(weights)))
    whole = len(weights) // width * width
    sums = weights[:whole].reshape(-1, width).sum(axis=1, dtype=np.float64)
    ends = np.append(sums, weights[whole:].sum(dtype=np.float64)).cumsum()
    sought = share * ends[-1]
    stretch = int(np.searchsorted(ends, sought, side="right"))
    first = min(stretch * width, len(weights) - 1)
    inner = weights[first : first + width].cumsum(dtype=np.float64)
    at = int(np.searchsorted(inner, sought - (ends[stretch - 1] if stretch else 0), side="right"))
    return first + min(at, len(inner) - 1)  # rounding can put the draw on the very end


def keep_top_k(scores: Scores, k: int | None, temperature: float) -> tuple[Ids, Scores]:
    """(ids ascending, weights) of the k likeliest tokens, and of ties with the last one.

    Weights are probabilities at the temperature up to a common factor; the largest is 1.
    """
    if k is not None and k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        kept = scores[tokens]
    else:
        tokens, kept = np.arange(len(scores)), scores
    with np.errstate(over="ignore"):  # a temperature near 0 leaves only the likeliest token
        return tokens, np.exp((kept - kept.max()) / np.float32(max(temperature, COLDEST)))


def nucleus(tokens: Ids, weights: Scores, p: float | None) -> tuple[Ids, Scores]:
    """The smallest set of likeliest tokens with at least share p of the weight; lower ids first on ties."""
    if p is None or p >= 1:
        return tokens, weights
    share = p * weights.sum(dtype=np.float64)
    # Tokens below (1 - p) / n of the weight sum to less than 1 - p, so the result is among the rest.
    likely = np.flatnonzero(weights >= np.float32(share * (1 - p) / (p * len(weights))))
    falling = np.sort(weights[likely])[::-1]  # sorting values alone is many times faster than a stable sort of ids
    count = min(int(np.searchsorted(np.cumsum(falling, dtype=np.float64), share)) + 1, len(falling))
    least = falling[count - 1]
    above, equal = likely[weights[likely] > least], likely[weights[likely] == least]
    kept = np.sort(np.concatenate([above, equal[: count - len(above)]]))
    return tokens[kept], weights[kept]
