"""The one thread that runs the model. Others give it work and get tokens back."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ModelError
from runtime.generate import Generation
from runtime.model import Model
from runtime.sampling import Sampling, likeliest
from runtime.server.errors import BROKEN, Refused, ending
from runtime.server.turns import InTurn
from runtime.together import Together
from runtime.writing import Limits, Token, Writing

# Tokens of prompts that are read between two steps. With GPT-2 small's shape (int8, one thread) a piece takes 80 ms, as
# long as two steps of 16 texts: so much later the texts beside a long prompt get their next token. A prompt of 1000
# tokens takes 5 % longer than in pieces of 128, and in pieces of 32, which take 46 ms, 19 %.
PIECE = 64
KEPT = 60.0  # seconds without work after which the memory of texts is given back
STUCK = 300.0  # seconds in one turn after which the thread counts as stuck

Ids = NDArray[np.int64]
log = logging.getLogger("dmpt_export.server")


@dataclass(frozen=True)
class Scores:
    """Log-probs of a prompt's tokens, each after those before it; None for the first one."""

    logprobs: list[float | None]
    top: list[tuple[tuple[int, float], ...]]  # the likeliest tokens at each place


@dataclass(frozen=True)
class Written:
    """One more token of a text."""

    token: Token
    reason: str | None  # why it is the last one


class Ended:
    """The last event of a text that was cut off: the server ends, or its client has gone."""


Event = Written | Scores | Refused | Ended


def is_last(event: Event) -> bool:
    """Whether no event of the same job follows."""
    return not isinstance(event, Written) or event.reason is not None


@dataclass(eq=False)
class Job:
    """One text to write, or one prompt to score."""

    prompt: Ids
    sampling: Sampling
    limits: Limits
    index: int  # of the choice; of the prompt, when scoring
    scoring: bool = False
    cancelled: bool = False  # set by any thread
    scores: Scores = field(default_factory=lambda: Scores([None], [()]))


class Writer(threading.Thread):
    """submit() and close() may be called from any thread."""

    def __init__(
        self, model: Model, rows: int, exact: bool, hand_out: Callable[[list[tuple[Job, Event]]], None]
    ) -> None:
        """rows: texts written at once; exact: in turn. hand_out: called in this thread with what a step made."""
        super().__init__(name="writer", daemon=True)
        self.model, self.rows, self.hand_out = model, rows, hand_out
        self.in_turn = exact or model.manifest.rounds_rows_together
        self.waiting: deque[Job] = deque()
        self.taken: dict[Job, None] = {}  # jobs that wait no more and have not ended, in order
        self.running: dict[Writing, Job] = {}
        self.scoring: deque[tuple[Job, Iterator[None]]] = deque()
        self.changed = threading.Condition()
        self.closed = self.cut_off = False
        self.together = self.fresh()
        self.turn_began: float | None = None  # None while there is nothing to do
        self.steps, self.step_seconds = 0, 0.0

    def fresh(self) -> Together | InTurn:
        """An empty batch, with room for whole contexts: the system gives memory only to what is written, whereas making
        room later copies all texts, which holds them up (16 texts of GPT-2 small's shape: 0.3 s and more)."""
        if self.in_turn:
            return InTurn(self.rows)
        return Together(self.model, self.rows, self.model.context, piece=PIECE)

    def submit(self, jobs: list[Job]) -> None:
        with self.changed:
            self.waiting.extend(jobs)
            self.changed.notify()

    def wake(self) -> None:
        """Let the thread look at flags that have changed."""
        with self.changed:
            self.changed.notify()

    def close(self) -> None:
        """End the thread after its current turn."""
        self.closed = True
        self.wake()

    @property
    def is_well(self) -> bool:
        began = self.turn_began
        return self.is_alive() and (began is None or time.monotonic() - began < STUCK)

    def run(self) -> None:
        while not self.closed:
            self.rest()
            self.turn_began = time.monotonic()
            try:
                events = self.turn()
            except Exception:
                log.exception("the model failed; the texts that were being written are lost")
                events = self.lose_all()
            if events:
                self.hand_out(events)

    def rest(self) -> None:
        """Wait until there is something to do. The caches are freed after a while, not at once, because memory that the
        process did not have before is slow to write."""
        with self.changed:
            if not (self.waiting or self.running or self.scoring or self.closed):
                self.turn_began = None
                if not self.changed.wait_for(lambda: self.waiting or self.closed, KEPT):
                    self.together = self.fresh()
                    self.changed.wait_for(lambda: self.waiting or self.closed)

    def turn(self) -> list[tuple[Job, Event]]:
        """Sort out, take in, score a piece of a prompt, and write one token of each text.

        A job stays in `taken` until its last event is sure to be handed out: none is forgotten where the model fails.
        """
        events = self.sort_out()
        while self.waiting and len(self.together) < self.rows:
            self.take_in(self.waiting.popleft())
        events += self.score()
        start = time.perf_counter()
        for text, token in self.together.step():
            event = Written(token, text.stop_reason) if isinstance(token, Token) else failed(token)
            events.append((self.running[text], event))
        self.steps, self.step_seconds = self.steps + 1, self.step_seconds + time.perf_counter() - start
        for job in [job for job, event in events if is_last(event)]:
            self.taken.pop(job, None)
        self.running = {text: job for text, job in self.running.items() if job in self.taken}
        return events

    def take_in(self, job: Job) -> None:
        self.taken[job] = None
        if job.scoring:
            self.scoring.append((job, scored(self.model, job)))
            return
        kind = Generation if self.in_turn else Writing
        text = kind(self.model, job.prompt, job.sampling, job.limits, 0)
        self.running[text] = job
        self.together.enter(text)

    def sort_out(self) -> list[tuple[Job, Event]]:
        """Drop what nobody waits for any more; at the server's end, everything."""
        with self.changed:
            late = [job for job in self.waiting if job.cancelled or self.cut_off]
            self.waiting = deque(job for job in self.waiting if job not in late)
        for text, job in self.running.items():
            if job.cancelled or self.cut_off:
                self.together.drop(text)
        self.taken |= dict.fromkeys(late)
        gone = {job for job in self.taken if job.cancelled or self.cut_off}
        self.running = {text: job for text, job in self.running.items() if job not in gone}
        self.scoring = deque(pair for pair in self.scoring if pair[0] not in gone)
        return [(job, ending() if job in late and not job.cancelled else Ended()) for job in gone]

    def score(self) -> list[tuple[Job, Event]]:
        """Score one piece of the first prompt that is to be scored."""
        if not self.scoring:
            return []
        job, pieces = self.scoring[0]
        if next(pieces, False) is None:
            return []
        self.scoring.popleft()
        return [(job, job.scores)]

    def lose_all(self) -> list[tuple[Job, Event]]:
        """Forget all texts in memory, whose caches may be half-written; those that wait are not lost."""
        jobs, self.taken, self.running, self.scoring = [*self.taken], {}, {}, deque()
        self.together = self.fresh()
        return [(job, failed()) for job in jobs]


def scored(model: Model, job: Job) -> Iterator[None]:
    """Fill job.scores; yields after each piece of the prompt."""
    at, most = 1, job.limits.logprobs or 0
    for log_probs, _, _ in model.score_pieces(job.prompt[:-1]) if len(job.prompt) > 1 else ():
        for row in log_probs:
            job.scores.logprobs.append(float(row[job.prompt[at]]))
            job.scores.top.append(likeliest(row, most))
            at += 1
        yield


def failed(error: ModelError | None = None) -> Refused:
    why = "the model failed while it wrote this text: try again" if error is None else str(error)
    return Refused(500, why, code="model_failed", kind=BROKEN)
