"""Texts that are written together in one batch. They may join and leave between any two steps."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from runtime.batch import Batch
from runtime.errors import ModelError, RequestError
from runtime.saved_prompt import State
from runtime.sequence import Sequence
from runtime.writing import TextModel, Token, Writing


class Generator(TextModel, Protocol):
    """The part of runtime.model.Model that the loops use."""

    def sequence(self, capacity: int = 0) -> Sequence: ...

    def batch(self, rows: int, capacity: int = 0) -> Batch: ...


class Together:
    """Each text has a row of a batch, from enter() until it ends or is dropped; the next one takes over its row.

    A prompt is read in the first step after enter(). With `piece`, a step reads about that many tokens of prompts, so
    that a long prompt does not hold up the texts beside it. All rows of a batch run together; therefore a row whose
    prompt is not read to its end runs with a token that is forgotten again.

        row 0    prompt ===== = = = =          a column of = is one step
        row 1    prompt = = =    == = =        its text ended, another one took over its row
        row 2    prompt ==== ==== ==== = =     read in pieces
    """

    def __init__(
        self, model: Generator, rows: int, capacity: int = 0, saved: State | None = None, piece: int | None = None
    ) -> None:
        """rows: most texts at once. capacity: tokens to make room for. saved: a text with which all prompts begin."""
        self.model, self.rows, self.saved, self.piece = model, rows, saved, piece
        self.batch = model.batch(rows, capacity)
        self.texts: list[Writing | None] = []  # by row; None where a text has left
        self.new: list[int] = []  # the token that each row reads in the next step
        self.unread: dict[Writing, list[int]] = {}  # what texts have to read before that, in the order of enter()
        self.log_probs = np.empty((rows, model.vocab_size), np.float32)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts) - self.texts.count(None)

    def enter(self, text: Writing) -> None:
        """Let a new text take part from the next step on. Raises RequestError where all rows are in use."""
        if len(self) == self.rows:
            raise RequestError(f"all {self.rows} rows are in use: wait until a text has ended")
        if None in self.texts:
            row = self.texts.index(None)
            self.texts[row] = text
        else:
            row = len(self.texts)
            self.texts.append(text)
            self.new.append(0)
            self.batch.resize(len(self.texts))
        self.begin(row, text, text.prompt.tolist(), self.saved)

    def begin(self, row: int, text: Writing, ids: list[int], saved: State | None = None) -> None:
        """Give a row these tokens to read: all but the last one before the next step, the last one in it."""
        self.batch.forget(row)
        if saved is not None:
            self.batch.put(row, saved)
            self.batch.lengths[row] = min(len(saved.ids), len(ids) - 1)
        self.new[row] = ids[-1]
        if unread := ids[int(self.batch.lengths[row]) : -1]:
            self.unread[text] = unread

    def drop(self, text: Writing) -> None:
        """Forget a text that has not ended. One that is not here any more is no error."""
        if text in self.texts:
            self.texts[self.texts.index(text)] = None
            self.unread.pop(text, None)

    def step(self) -> list[tuple[Writing, Token | ModelError]]:
        """The next token of each text whose prompt is read, or why that text cannot go on; such a text has left."""
        self.close_gaps()
        self.read()
        if len(self.unread) == len(self.texts):
            return []
        routes = self.batch.run(self.new, self.log_probs[: len(self.texts)])
        made = []
        for row, text in enumerate(self.texts):
            assert text is not None  # the gaps are closed
            if text in self.unread:
                self.batch.lengths[row] -= 1
            else:
                made.append((text, self.take(row, text, int(routes[row]))))
        return made

    def take(self, row: int, text: Writing, leaf: int) -> Token | ModelError:
        used = int(self.batch.lengths[row])
        try:
            token = text.take(self.log_probs[row], leaf, used)
        except ModelError as error:
            self.texts[row] = None
            return error
        if text.stop_reason is not None:
            self.texts[row] = None
        elif used == self.model.context:  # on_full is "slide"
            self.begin(row, text, text.kept())
        else:
            self.new[row] = token.id
        return token

    def read(self) -> None:
        """Read all prompts, or one piece: of the first one that is unread, and others as far as they fit in whole."""
        room = self.piece
        for text, ids in [*self.unread.items()]:
            count = len(ids) if room is None else min(room, len(ids))
            if room is not None and room != self.piece and count < len(ids):
                return
            self.batch.run_row(self.texts.index(text), ids[:count], self.log_probs[0])
            del ids[:count]
            if not ids:
                del self.unread[text]
            if room is not None:
                room -= count
                if not room:
                    return

    def close_gaps(self) -> None:
        """Move texts from the last rows into those that were left."""
        stay = [row for row, text in enumerate(self.texts) if text is not None]
        last = [row for row in stay if row >= len(stay)]
        order = [row if self.texts[row] is not None else last.pop() for row in range(len(stay))]
        if order and len(order) < len(self.texts):
            self.batch.reorder(order)
        self.texts, self.new = [self.texts[row] for row in order], [self.new[row] for row in order]
