"""Log-likelihoods of continuations, as the lm-evaluation-harness defines them; without the harness itself.

context       0 1 2 3
continuation          4 5 6
fed           0 1 2 3 4 5        the last token is only predicted
predicted             4 5 6      by the last len(continuation) rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.model import SCORED_AT_ONCE, Model

Ids = list[int]
Pair = tuple[Ids, Ids]  # context, continuation
Answer = tuple[float, bool]  # log-likelihood in nats; whether greedy decoding gives the same tokens


@dataclass(frozen=True)
class Job:
    """One run: tokens to feed, how many of their last rows to judge, and the requests that these rows answer."""

    fed: Ids
    last: int
    targets: dict[int, Ids]  # request -> the `last` tokens that it wants predicted


class Likelihoods:
    """Scores one pair after the other. The tokens that a pair shares with the one before it are not run again."""

    def __init__(self, model: Model) -> None:
        self.model = model
        # Kernels that round all rows of a run together would make a score depend on the requests before it.
        self.shares = not model.manifest.rounds_rows_together
        self.text = model.sequence()
        self.fed: Ids = []  # the tokens that `text` holds

    def score(self, pairs: Sequence[Pair], done: Callable[[int], object] = lambda answered: None) -> list[Answer]:
        """Sum of the continuation's log-probs in nats, and whether each of its tokens is the likeliest.

        Pairs are sorted by their tokens, so that equal beginnings (the examples of few-shot prompts) are run once.
        A pair that is too long loses its first tokens. done: called with the number of requests answered so far.
        Raises RequestError for a continuation that is empty or does not fit the context.
        """
        answers: list[Answer] = [(0.0, True)] * len(pairs)
        count = 0
        for job in sorted(self.jobs(pairs), key=lambda job: job.fed):
            for request, answer in self.answers(job).items():
                answers[request] = answer
            count += len(job.targets)
            done(count)
        return answers

    def jobs(self, pairs: Sequence[Pair]) -> list[Job]:
        """The runs that the pairs need; pairs that differ in their last token alone share one."""
        jobs: dict[tuple[tuple[int, ...], int], Job] = {}
        for request, (context, continuation) in enumerate(pairs):
            self.check(context, continuation)
            fed, last = (context + continuation)[-(self.model.context + 1) : -1], len(continuation)
            jobs.setdefault((tuple(fed), last), Job(fed, last, {})).targets[request] = continuation
        return [*jobs.values()]

    def check(self, context: Ids, continuation: Ids) -> None:
        most = self.model.context
        if not context or not continuation:
            raise RequestError("a request has no tokens to continue, or none to score: check the task's texts")
        if len(continuation) > most:
            raise RequestError(
                f"a continuation of {len(continuation)} tokens does not fit the context of {most}: choose a task with "
                "shorter answers, or a model with a longer context"
            )

    def answers(self, job: Job) -> dict[int, Answer]:
        """Log-likelihood and greediness of each request's tokens."""
        wanted = np.array([*job.targets.values()])  # [requests, last]
        totals, greedy, at = np.zeros(len(wanted)), np.ones(len(wanted), np.bool_), 0
        for rows in self.rows(job.fed, job.last):  # [n, V]
            here = wanted[:, at : at + len(rows)]
            totals += rows[np.arange(len(rows)), here].sum(axis=1, dtype=np.float64)
            greedy &= (here == rows.argmax(-1)).all(axis=1)
            at += len(rows)
        return {request: (float(totals[i]), bool(greedy[i])) for i, request in enumerate(job.targets)}

    def rows(self, fed: Ids, last: int) -> Iterator[NDArray[np.float32]]:
        """Log-probs after each of the last `last` tokens, in pieces of 64 rows [n, V], as Model.score_pieces."""
        skipped = len(fed) - last
        # at most the tokens before the first wanted row, whose log-probs are not kept
        self.text.rewind(min(skipped, shared(self.fed, fed)) if self.shares else 0)
        self.fed = []  # after an error, what the text holds is unknown
        for row in range(0, last, SCORED_AT_ONCE):
            until = min(row + SCORED_AT_ONCE, last)
            yield self.text.feed(fed[self.text.length : skipped + until], until - row)[0]
        self.fed = fed


def shared(one: Ids, other: Ids) -> int:
    """Length of the longest beginning that both have.

    >>> shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    most = min(len(one), len(other))
    unlike = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(unlike[0]) if len(unlike) else most
