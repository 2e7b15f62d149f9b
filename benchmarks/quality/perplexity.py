"""Perplexity, accuracy and use of paths and heads on a text, by the protocols of benchmarks.quality.protocols.

One loop for every model and protocol: it takes windows, gets a few rows of log-probs at a time, and keeps only the
values that the figures need.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.machine import versions
from benchmarks.quality.divergence import Base, kl_divergence, standard_error, statistics
from benchmarks.quality.progress import Findings, fingerprint, key_of
from benchmarks.quality.protocols import PROTOCOLS, STRIDE_CONCAT, Text, choose_windows, plan
from benchmarks.quality.scorer import Piece, Scorer, pieces
from training.checkpoints.lock import working_in
from training.errors import InputError, ValidationError
from training.progress import Bar
from training.text.sources import FIELD
from training.text.windows import check_vocabulary, encode_lines

MOST_NATS = 700.0  # exp() of more overflows float64
NO_ROUTE = -1


@dataclass(frozen=True)
class Resume:
    """Where to store the state of an evaluation."""

    folder: str | Path
    keep: bool = False  # also after completion, so that the same evaluation takes no time


@dataclass(frozen=True, eq=False)
class Quality:
    """Scores of a model on a text. Logarithms are natural."""

    tokens: int  # in the text, including end-of-text
    tokens_scored: int
    sum_log_prob: float
    accuracy: float  # share of scored tokens with the highest probability (top-1)
    standard_error: float  # of the mean negative log-likelihood per token, treating tokens as independent
    route_shares: dict[str, float]  # leaf -> share of scored tokens; {} for modes without a choice
    max_length: int
    stride: int
    mode: str
    tokens_sha256: str  # of the token ids: equal means the same text through the same tokenizer
    nll: NDArray[np.float64] = field(repr=False)  # [tokens_scored], in the text's order
    protocol: str = STRIDE_CONCAT
    top5_accuracy: float | None = None  # share of scored tokens among the five likeliest
    words_scored: int | None = None  # see benchmarks.quality.protocols; None if only token ids were given
    bytes_scored: int | None = None
    switch_share: float | None = None  # of tokens on a different path from the token before; None without a choice
    path_perplexity: dict[str, float] = field(default_factory=dict)  # leaf -> perplexity of the tokens routed to it
    head_shares: dict[str, dict[int, float]] | None = None  # leaf -> head -> mean weight; None: not available
    base: dict[str, Any] | None = None  # see benchmarks.quality.divergence.statistics

    @property
    def mean_nll(self) -> float:
        return -self.sum_log_prob / self.tokens_scored

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)

    @property
    def word_perplexity(self) -> float | None:
        """exp of the total loss over the number of words scored; None without words."""
        return _exp(-self.sum_log_prob / self.words_scored) if self.words_scored else None

    @property
    def bits_per_byte(self) -> float | None:
        return -self.sum_log_prob / math.log(2) / self.bytes_scored if self.bytes_scored else None

    def to_json(self) -> dict[str, Any]:
        keys = ("tokens_scored", "perplexity", "accuracy", "sum_log_prob", "mean_nll", "standard_error")
        more = ("route_shares", "tokens", "tokens_sha256", "max_length", "stride", "mode", "protocol", "top5_accuracy")
        text = ("word_perplexity", "bits_per_byte", "words_scored", "bytes_scored")
        paths = ("switch_share", "path_perplexity", "head_shares")
        return {k: getattr(self, k) for k in (*keys, *more, *text, *paths, "base")}


def read_text(scorer: Scorer, paths: Sequence[str | Path], field: str = FIELD, protocol: str = STRIDE_CONCAT) -> Text:
    """The text as the protocol's tokens. Raises InputError when a file is empty, unreadable or not UTF-8, or the
    tokenizer does not fit the model.

    paths: files or hub datasets, see training.text.windows.read_lines. field: text field of JSON and tables.
    """
    check_vocabulary(scorer.tokenizer, scorer.vocab_size, scorer.folder)
    return PROTOCOLS[protocol].read([Path(path) for path in paths], scorer.tokenizer, scorer.end_of_text, field)


def read_tokens(scorer: Scorer, paths: Sequence[str | Path], field: str = FIELD) -> NDArray[np.int32]:
    """The ids of read_text() for stride-concat, int32 [N], without a count of words and bytes."""
    check_vocabulary(scorer.tokenizer, scorer.vocab_size, scorer.folder)
    return encode_lines([Path(path) for path in paths], scorer.tokenizer, scorer.end_of_text, field)


def evaluate(
    scorer: Scorer,
    text: Text | NDArray[np.integer],
    max_length: int | None = None,
    stride: int | None = None,
    protocol: str = STRIDE_CONCAT,
    batch: int = 1,
    base: Base | None = None,
    resume: Resume | None = None,
) -> Quality:
    """Score a text, or token ids [N], by a protocol, with a progress bar that shows the running perplexity.

    batch: windows that a torch checkpoint runs together. base: the model to measure KL from; it must have the same
    tokens (check_base). resume: where the state is stored; a killed evaluation continues from it and gives the same
    digits.
    Raises InputError when no token can be scored, an id is beyond the vocabulary or a stored state is damaged,
    ValidationError when the log-probabilities do not give a finite perplexity.
    """
    ids = text.ids if isinstance(text, Text) else text
    length, step = choose_windows(scorer.context, max_length, stride, protocol)
    windows = plan(len(ids), length, step, protocol)
    if int(ids.max()) >= scorer.vocab_size:
        raise InputError(f"token {int(ids.max())} is beyond the model's vocabulary of {scorer.vocab_size}")
    facts: dict[str, Any] = {"tokens": sha256(ids), "protocol": protocol, "length": length, "stride": step}
    if base is not None:
        choose_windows(base.scorer.context, length, step, protocol)
        size = base.prepare(facts, windows)
        if size:
            tqdm.write(f"base log-probs: {size / 1e9:.2f} GB in {base.folder}", file=sys.stderr)
    file = None
    if resume is not None:
        key = key_of(model=fingerprint(scorer), batch=batch, base=base_key(base), versions=versions(), **facts)
        file = Path(resume.folder) / f"eval-{key}.npz"
    sizes = [n for _, _, n in windows]
    with contextlib.nullcontext() if file is None else working_in(file, "eval", beside=True):
        findings = Findings(columns(scorer, sum(sizes), base is not None), file, sizes)
        try:
            run(scorer, ids, windows, findings, batch, base)
        except BaseException:  # also when interrupted; a kill loses everything after the last write
            with contextlib.suppress(OSError):
                findings.save()
            raise
        found = summary(scorer, ids, text if isinstance(text, Text) else None, windows, findings, base)
        if resume is not None and resume.keep:
            try:
                findings.save()
            except OSError as error:  # the result is still valid
                tqdm.write(f"the scores of {scorer.name} are not stored: {error.strerror or error}", file=sys.stderr)
        else:
            findings.finish()
    return Quality(
        tokens=len(ids), max_length=length, stride=step, mode=scorer.mode, tokens_sha256=facts["tokens"],
        protocol=protocol, **found,
    )  # fmt: skip


def base_key(base: Base | None) -> list[str] | None:
    """Identifies the base of a state's KL; a cached base differs in the last digits from a running one."""
    return None if base is None else [base.key, fingerprint(base.scorer), str(base.cache is not None)]


def columns(scorer: Scorer, total: int, with_base: bool) -> dict[str, NDArray[Any]]:
    """The values stored for each scored token. rank: see ranks()."""
    kept: dict[str, NDArray[Any]] = {
        "nll": np.empty(total, np.float64),
        "rank": np.empty(total, np.int32),
        "routes": np.empty(total, np.int16),
    }
    if n_heads := getattr(scorer, "n_heads", 0):
        kept["heads"] = np.empty((total, n_heads), np.float32)
    if with_base:
        kept |= {"kl": np.empty(total, np.float64), "base_nll": np.empty(total, np.float64)}
        kept["same_top"] = np.empty(total, np.bool_)
    return kept


def run(
    scorer: Scorer,
    ids: NDArray[np.integer],
    windows: Sequence[tuple[int, int, int]],
    findings: Findings,
    batch: int,
    base: Base | None,
) -> None:
    """The loop: continue filling the findings. A batch always holds the same windows."""
    total = sum(n for _, _, n in windows)
    with Bar(total=total, initial=findings.done, desc=f"eval {scorer.name}", unit="tok") as bar:
        for first in range(findings.windows, len(windows), batch):
            group = windows[first : first + batch]
            asked = [(ids[start : stop - 1], n) for start, stop, n in group]
            targets = [ids[stop - n : stop] for _, stop, n in group]
            if base is not None:
                base.start(first, asked, targets)
            rest = np.concatenate(targets)
            for piece in pieces(scorer, asked):
                n = len(piece.log_probs)
                values, rest = judged(piece, rest[:n], base, scorer.name), rest[n:]
                findings.add(**{name: values[name] for name in findings.arrays})
                bar.set_postfix_str(estimate(findings["nll"][: findings.done]), refresh=False)
                bar.update(n)
            findings.end_of_windows(len(group))


def judged(piece: Piece, targets: NDArray[np.integer], base: Base | None, name: str) -> dict[str, Any]:
    """The columns of a piece's rows."""
    found = {
        "nll": gold_nll(piece.log_probs, targets, name),
        "rank": ranks(piece.log_probs, targets),
        "routes": NO_ROUTE if piece.routes is None else piece.routes,
        "heads": piece.head_weights,
    }
    if base is not None:
        log_probs, base_gold = base.take(len(targets))
        found["kl"] = kl_divergence(log_probs, piece.log_probs)
        found["base_nll"] = -base_gold.astype(np.float64)
        found["same_top"] = log_probs.argmax(-1) == piece.log_probs.argmax(-1)
    return found


def ranks(log_probs: NDArray[np.float32], targets: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rank of each target, from 0: (n, V), (n,) -> (n,). Of equal values, the lower token id comes first."""
    gold = log_probs[np.arange(len(targets)), targets][:, None]
    rank = np.count_nonzero(log_probs > gold, axis=-1)
    for i in np.flatnonzero(np.count_nonzero(log_probs >= gold, axis=-1) > rank + 1):
        rank[i] += np.count_nonzero(log_probs[i, : targets[i]] == gold[i])
    return rank


def summary(
    scorer: Scorer,
    ids: NDArray[np.integer],
    text: Text | None,
    windows: Sequence[tuple[int, int, int]],
    findings: Findings,
    base: Base | None,
) -> dict[str, Any]:
    """The figures of Quality from the columns alone."""
    nll, rank, routes = findings["nll"], findings["rank"], findings["routes"]
    if nll.mean() > MOST_NATS:
        raise ValidationError(
            f"{scorer.name} has a loss of {nll.mean():.0f} nats per token, too high for a perplexity: it is damaged"
        )
    mine = {leaf: routes == i for i, leaf in enumerate(scorer.leaves)}
    routed = bool((routes != NO_ROUTE).any())
    scored = np.concatenate([np.arange(stop - n, stop) for _, stop, n in windows])  # positions in the text
    return {
        "nll": nll,
        "tokens_scored": len(nll),
        "sum_log_prob": -float(nll.sum()),
        "accuracy": int((rank == 0).sum()) / len(nll),
        "top5_accuracy": int((rank < 5).sum()) / len(nll),
        "standard_error": standard_error(nll),
        "route_shares": {leaf: int(on.sum()) / len(nll) for leaf, on in mine.items()} if routed else {},
        "switch_share": switch_share(routes, scored, ids[scored - 1] == scorer.end_of_text) if routed else None,
        "path_perplexity": {leaf: _exp(nll[on].mean()) for leaf, on in mine.items() if on.any()},
        "head_shares": head_shares(scorer, findings["heads"], mine) if "heads" in findings.arrays else None,
        "words_scored": int(text.n_words[scored].sum()) if text is not None else None,
        "bytes_scored": int(text.n_bytes[scored].sum()) if text is not None else None,
        "base": None if base is None else statistics(
            base.scorer.name, findings["kl"], findings["same_top"], nll, findings["base_nll"]
        ),
    }  # fmt: skip


def switch_share(routes: NDArray[np.integer], places: NDArray[np.integer], starts: NDArray[np.bool_]) -> float:
    """Share of tokens that take a different path from the token before, given routes of tokens at `places` of a text.

    starts: tokens that end a text and so begin the next one; they are not counted. All [n].
    """
    neighbours = (np.diff(places) == 1) & ~starts[1:]
    return float((np.diff(routes) != 0)[neighbours].mean()) if neighbours.any() else 0.0


def head_shares(
    scorer: Scorer, weights: NDArray[np.float32], mine: dict[str, NDArray[np.bool_]]
) -> dict[str, dict[int, float]]:
    """Mean weight of each head over the tokens of its leaf: leaf -> head -> weight; 0 if the leaf has no token."""
    sums = {leaf: weights[on].sum(0, dtype=np.float64) / max(1, int(on.sum())) for leaf, on in mine.items()}
    return {leaf: {j: float(sums[leaf][j]) for j in heads} for leaf, heads in scorer.head_allocation.items()}


def estimate(nll: NDArray[np.float64]) -> str:
    """The running perplexity with its standard error."""
    perplexity = _exp(nll.mean())
    return f"perplexity {perplexity:.3f} ± {perplexity * standard_error(nll):.3f}"


def sha256(ids: NDArray[np.integer]) -> str:
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def _exp(nats: float) -> float:
    return math.exp(min(float(nats), MOST_NATS))


def gold_nll(log_probs: NDArray[np.float32], targets: NDArray[np.integer], name: str) -> NDArray[np.float64]:
    """Negative log-likelihood of the targets: (n, V), (n,) -> (n,), in float64."""
    gold = np.take_along_axis(log_probs, np.asarray(targets, dtype=np.int64)[:, None], axis=1)[:, 0]
    if not np.isfinite(gold).all():
        bad = int(np.flatnonzero(~np.isfinite(gold))[0])
        raise ValidationError(
            f"{name} gives token {int(targets[bad])} a log-probability of {gold[bad]}, so it has no perplexity: its "
            "weights or activations are not finite"
        )
    return -gold.astype(np.float64)
