"""Several texts in turn, one token each, where a batch would change them."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.errors import ModelError, RequestError
from runtime.generate import Generation
from runtime.writing import Token, Writing


class InTurn:
    """Like Together, where texts must not change each other at all: each has caches of its own, and a step runs the
    graph once for each. A prompt is read whole, because pieces would be rounded differently."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.texts: dict[Writing, Iterator[Token]] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def enter(self, text: Writing) -> None:
        if len(self) == self.rows:
            raise RequestError(f"all {self.rows} places are in use: wait until a text has ended")
        assert isinstance(text, Generation)
        self.texts[text] = iter(text)

    def drop(self, text: Writing) -> None:
        self.texts.pop(text, None)

    def step(self) -> list[tuple[Writing, Token | ModelError]]:
        """The next token of each text, or why it cannot go on; such a text has left."""
        made: list[tuple[Writing, Token | ModelError]] = []
        for text, tokens in [*self.texts.items()]:
            try:
                made.append((text, next(tokens)))
            except ModelError as error:
                made.append((text, error))
            if text.stop_reason is not None or isinstance(made[-1][1], ModelError):
                del self.texts[text]
        return made
