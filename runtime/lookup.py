"""Guessing the next tokens from the text so far: what followed the same words before may follow them again.

Source: "prompt lookup decoding" (A. Saxena, 2023), a form of speculative decoding (Leviathan et al., 2023) whose
draft costs nothing. Wrong guesses cost the rows that check them, so the guess shrinks where the text does not repeat.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_SPECULATED = 64  # tokens guessed at once; each costs a row of the vocabulary

LONGEST, SHORTEST = 4, 2  # tokens that have to be equal; a single one says too little


class Lookup:
    """Remembers where every run of 2 to 4 tokens was last seen."""

    def __init__(self, ids: Iterable[int], most: int) -> None:
        """most: tokens guessed at once, at most."""
        self.most = self.size = most
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # run of tokens -> index behind its latest occurrence
        self.add(ids)

    def add(self, ids: Iterable[int]) -> None:
        for token in ids:
            end = len(self.ids)
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self.after[tuple(self.ids[-length:])] = end  # noted only now that something follows it
            self.ids.append(token)

    def guess(self, room: int) -> list[int]:
        """What followed the longest end of the text that occurred before: up to `room` tokens, often none."""
        for length in range(min(LONGEST, len(self.ids)), SHORTEST - 1, -1):
            found = self.after.get(tuple(self.ids[-length:]))
            if found is not None:
                return self.ids[found : found + min(room, self.size)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Guess more after a guess that was right as a whole, less after one that was wrong from the start."""
        if guessed and right == guessed:
            self.size = min(2 * self.size, self.most)
        elif guessed and right == 0:
            self.size = max(self.size // 2, 1)
