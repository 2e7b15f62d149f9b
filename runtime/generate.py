"""The generation loops: choose a token, emit its text, feed it back, until a stop condition holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ModelError, RequestError
from runtime.lookup import Lookup
from runtime.manifest import PER_TENSOR
from runtime.sampling import Sampling
from runtime.saved_prompt import State
from runtime.sequence import Sequence
from runtime.together import Generator, Together
from runtime.writing import Limits, Token, Writing

TOGETHER = 16  # texts of a batch in memory at once; the others follow as these end


class Generation(Writing):
    """One text; iterate over it to generate it. See Writing for its attributes."""

    model: Generator

    def __init__(
        self,
        model: Generator,
        prompt: NDArray[np.int64],
        sampling: Sampling,
        limits: Limits,
        row: int = 0,
        after: Sequence | None = None,
    ) -> None:
        """after: a text that was read already, with which the prompt begins. A copy of it is continued."""
        super().__init__(model, prompt, sampling, limits, row)
        self.after = after
        self.known = 0 if after is None else min(after.length, len(prompt) - 1)  # tokens that are not read again
        if limits.speculate:
            check_speculation(model)
        self.runs = self.drafted = self.accepted = 0  # runs of the graph; tokens guessed, and those that proved right

    def __iter__(self) -> Iterator[Token]:
        """Feed new tokens and then `guesses` in one run; keep the guesses that the model also chooses.

        Every token is chosen from the model's own distribution, so guesses change neither a greedy text nor what is
        drawn at a temperature: they only let one run choose several tokens. It is the verification of Leviathan et al.
        (2023) for a draft that proposes one token with certainty.
        """
        if self.ids:
            raise RequestError("this text was already generated: start a new one")
        sequence = self.model.sequence() if self.after is None else beginning(self.after, self.prompt)
        rows = np.empty((1 + self.limits.speculate, self.model.vocab_size), np.float32)
        drafting = bool(self.limits.speculate and self.model.manifest.draft_tokens)
        lookup = Lookup(self.prompt.tolist(), self.limits.speculate) if self.limits.speculate and not drafting else None
        new: list[int] = self.prompt[sequence.length :].tolist()
        guesses: list[int] = []
        while True:
            log_probs = rows[: 1 + len(guesses)]
            routes = sequence.run(new + guesses, log_probs, drafting=drafting)
            length = sequence.length - len(guesses)
            self.runs, self.drafted = self.runs + 1, self.drafted + len(guesses)
            for right, guess in enumerate([*guesses, None]):
                token = self.take(log_probs[right], routes[right], length + right)
                self.accepted += token.id == guess
                yield token
                if self.stop_reason is not None:
                    return
                if lookup is not None:
                    lookup.add([token.id])
                if token.id != guess:
                    break
            drafts = sequence.drafts()[right].tolist() if drafting else []
            sequence.rewind(length + right)
            new = [token.id]
            if sequence.length == self.model.context:  # on_full is "slide"
                sequence.reset()
                new = self.kept()
            room = self.room(sequence.length + len(new))
            if lookup is not None:
                lookup.learn(len(guesses), right)
                guesses = lookup.guess(room)
            else:
                guesses = drafts[: pairs(min(room, self.limits.speculate, len(drafts)))]

    def room(self, used: int) -> int:
        """How many guesses the context and max_new_tokens allow."""
        return min(self.model.context - used, self.limits.max_new_tokens - len(self.ids) - 1)


def beginning(after: Sequence, prompt: NDArray[np.int64]) -> Sequence:
    """A copy of a text with which a prompt begins, without the prompt's last token: running that predicts the next."""
    sequence = after.copy(len(prompt))
    sequence.rewind(len(prompt) - 1)
    if not np.array_equal(sequence.tokens, prompt[: sequence.length]):
        raise RequestError("the text to continue (after) has changed since: start again, or continue a copy() of it")
    return sequence


def pairs(guesses: int) -> int:
    """The largest number of drafts that makes the rows of a run even: kernels read weights once for two rows.

    >>> [pairs(n) for n in range(6)]
    [0, 1, 1, 3, 3, 5]
    """
    return guesses - (guesses > 0 and guesses % 2 == 0)


def check_speculation(model: Generator) -> None:
    if model.manifest.rounds_rows_together:
        raise RequestError(
            f"speculate would change the text with {PER_TENSOR} weights, whose rounding depends on how many tokens "
            "run at once: leave it out, or export int8 weights"
        )


class Generations:
    """Several texts generated together; iterate to get their tokens (`Token.row` is the prompt's index). `texts` are
    complete afterwards. At most 16 are in memory at once; one where kernels round the rows of a batch together."""

    def __init__(
        self,
        model: Generator,
        prompts: Many[NDArray[np.int64] | None],
        sampling: Sampling,
        limits: Limits,
        after: Sequence | None = None,
    ) -> None:
        """prompts: None is left out, and keeps its row. after: a text that was read already, with which all begin."""
        if limits.speculate:
            raise RequestError("speculate works on one prompt at a time: leave it out, or give the prompts one by one")
        self.model, self.after = model, after
        given = [(row, prompt) for row, prompt in enumerate(prompts) if prompt is not None]
        self.alone: list[Generation] = []  # generated one after the other
        if model.manifest.rounds_rows_together:
            self.alone = [Generation(model, prompt, sampling, limits, row, after) for row, prompt in given]
        self.texts: list[Writing] = [*self.alone] or [Writing(model, p, sampling, limits, row) for row, p in given]

    def __iter__(self) -> Iterator[Token]:
        if any(text.ids for text in self.texts):
            raise RequestError("these texts were already generated: start new ones")
        for text in self.alone:
            yield from text
        if self.texts and not self.alone:
            yield from self.together()

    def together(self) -> Iterator[Token]:
        first, waiting = self.texts[:TOGETHER], deque(self.texts)
        together = Together(self.model, len(first), max(len(text.prompt) for text in first), self.saved())
        while waiting or len(together):
            while waiting and len(together) < together.rows:
                together.enter(waiting.popleft())
            for _, token in together.step():
                if isinstance(token, ModelError):
                    raise token
                yield token

    def saved(self) -> State | None:
        """The text with which all begin, processed by every node, as in a batch."""
        if self.after is None:
            return None
        sequence = beginning(self.after, max((text.prompt for text in self.texts), key=len))
        if sequence.length and set(sequence.done.values()) != {sequence.length}:
            last = sequence.tokens[-1:]
            sequence.rewind(sequence.length - 1)
            sequence.run(last, np.empty((1, self.model.vocab_size), np.float32), every_node=True)
        return sequence.state()
