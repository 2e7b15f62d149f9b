"""Perplexity and accuracy on a text, by the stride-concat protocol.

The non-empty lines of the text, stripped, are tokenised one by one with one end-of-text after each and
joined. Windows of `max_length` tokens advance by `stride`; each scores its last `stride` predictions, the
last window what is left. So the first `max_length - stride` tokens are never scored, every later token is
scored once, with at least `max_length - stride` tokens before it, and end-of-text targets count. With
GPT-2's tokenizer, WikiText's raw test file and 1024/512 that is 280,232 of 280,744 tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.scorer import Scorer
from training import data
from training.errors import InputError, ValidationError

MOST_NATS = 700.0  # exp() of more is no float64
LONGEST_WINDOW = 1024  # the protocol's window; a longer context is used only when asked for


@dataclass(frozen=True, eq=False)
class Quality:
    """What a model scored on a text. Logarithms are natural."""

    tokens: int  # in the text, end-of-text included
    tokens_scored: int
    sum_log_prob: float
    accuracy: float  # share of scored tokens that were the likeliest one (top-1)
    standard_error: float  # of the mean negative log-likelihood per token, tokens taken as independent
    route_shares: dict[str, float]  # leaf -> share of scored tokens; {} for modes without a choice
    max_length: int
    stride: int
    mode: str
    tokens_sha256: str  # of the token ids: equal means the same text through the same tokenizer
    nll: NDArray[np.float64] = field(repr=False)  # [tokens_scored], in the text's order

    @property
    def mean_nll(self) -> float:
        return -self.sum_log_prob / self.tokens_scored

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)

    def to_json(self) -> dict[str, Any]:
        keys = ("tokens_scored", "perplexity", "accuracy", "sum_log_prob", "mean_nll", "standard_error")
        more = ("route_shares", "tokens", "tokens_sha256", "max_length", "stride", "mode")
        return {key: getattr(self, key) for key in (*keys, *more)}


def read_tokens(scorer: Scorer, paths: Sequence[str | Path], field: str = data.FIELD) -> NDArray[np.int32]:
    """The text as the protocol's token ids [N]; InputError when a file is empty, unreadable or not UTF-8.

    paths: files or hub datasets, see training.data.read_lines. field: where the text is in JSON and tables.
    """
    known = scorer.tokenizer.get_vocab_size()
    if known > scorer.vocab_size:
        raise InputError(
            f"the tokenizer in {scorer.folder} knows {known} tokens, its model {scorer.vocab_size}: "
            "they do not belong together; put the model's own tokenizer beside it"
        )
    return data.encode_lines([Path(path) for path in paths], scorer.tokenizer, scorer.end_of_text, field)


def choose_windows(context: int, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride with the protocol's defaults filled in; InputError when they cannot be."""
    length = max_length or min(LONGEST_WINDOW, context)
    step = stride or max(1, length // 2)
    if not 2 <= length <= context:
        raise InputError(f"--max-length {length} must be from 2 to the model's context of {context} tokens")
    if not 1 <= step <= length:
        raise InputError(f"--stride {step} must be from 1 to the window's length (--max-length {length})")
    return length, step


def evaluate(
    scorer: Scorer, ids: NDArray[np.integer], max_length: int | None = None, stride: int | None = None
) -> Quality:
    """Score `ids` [N] by the protocol above, with a progress bar that shows the running perplexity.

    Raises InputError when no token can be scored or an id is beyond the vocabulary, ValidationError when
    the model gives log-probabilities that make no finite perplexity.
    """
    length, step = choose_windows(scorer.context, max_length, stride)
    plan = list(data.windows(len(ids), length, step))
    total = sum(n for _, _, n in plan)
    if not total:
        raise InputError(
            f"the text has {len(ids)} tokens, and windows of {length} advancing by {step} score only those after "
            f"the first {length - step}: give a longer text or a smaller --max-length"
        )
    if int(ids.max()) >= scorer.vocab_size:
        raise InputError(f"token {int(ids.max())} is beyond the model's vocabulary of {scorer.vocab_size}")
    nll = np.empty(total, dtype=np.float64)
    counts = np.zeros(len(scorer.leaves), dtype=np.int64)
    done = right = 0
    with tqdm(total=total, desc=f"eval {scorer.name}", unit="tok", disable=None) as bar:
        for start, stop, n in plan:
            log_probs, routes = scorer.score(ids[start : stop - 1], n)  # (n, V), (n,)
            targets = ids[stop - n : stop]
            nll[done : done + n] = gold_nll(log_probs, targets, scorer.name)
            right += int((log_probs.argmax(-1) == targets).sum())
            if routes is not None:
                counts += np.bincount(routes, minlength=len(counts))
            done += n
            bar.set_postfix_str(f"perplexity {math.exp(min(nll[:done].mean(), MOST_NATS)):.3f}", refresh=False)
            bar.update(n)
    if nll.mean() > MOST_NATS:
        raise ValidationError(
            f"{scorer.name} loses {nll.mean():.0f} nats a token: too bad for a perplexity, so damaged"
        )
    return Quality(
        tokens=len(ids),
        tokens_scored=total,
        sum_log_prob=-float(nll.sum()),
        accuracy=right / total,
        standard_error=standard_error(nll),
        route_shares={leaf: int(n) / total for leaf, n in zip(scorer.leaves, counts, strict=True) if counts.any()},
        max_length=length,
        stride=step,
        mode=scorer.mode,
        tokens_sha256=hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest(),
        nll=nll,
    )


def gold_nll(log_probs: NDArray[np.float32], targets: NDArray[np.integer], name: str) -> NDArray[np.float64]:
    """Negative log-likelihood of the targets: (n, V), (n,) -> (n,), in float64."""
    gold = np.take_along_axis(log_probs, np.asarray(targets, dtype=np.int64)[:, None], axis=1)[:, 0]
    if not np.isfinite(gold).all():
        bad = int(np.flatnonzero(~np.isfinite(gold))[0])
        raise ValidationError(
            f"{name} gives token {int(targets[bad])} a log-probability of {gold[bad]}: its weights or activations "
            "hold numbers that are not finite, so it has no perplexity"
        )
    return -gold.astype(np.float64)


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean; 0 for a single value, which has no spread."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
