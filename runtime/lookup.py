"""Guess the next tokens from the text so far: what followed the same tokens before may follow them again.

Source: "prompt lookup decoding" (A. Saxena, 2023), a form of speculative decoding (Leviathan et al., 2023) with a free
draft. Checking a wrong guess costs a row per token, so guesses shrink where the text does not repeat.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_SPECULATED = 64  # tokens guessed at once; each costs a vocabulary row

LONGEST, SHORTEST = 4, 2  # tokens that must match; a single one says too little


class Lookup:
    """Remembers where each run of 2 to 4 tokens last occurred."""

    def __init__(self, ids: Iterable[int], most: int) -> None:
        """most: the largest number of tokens to guess at once."""
        self.most = self.size = most
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # run of tokens -> index after its latest occurrence
        self.add(ids)

    def add(self, ids: Iterable[int]) -> None:
        for token in ids:
            end = len(self.ids)
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self.after[tuple(self.ids[-length:])] = end  # recorded once a token follows it
            self.ids.append(token)

    def guess(self, room: int) -> list[int]:
        """Up to `room` tokens that followed the longest repeated end of the text; often none."""
        for length in range(min(LONGEST, len(self.ids)), SHORTEST - 1, -1):
            found = self.after.get(tuple(self.ids[-length:]))
            if found is not None:
                return self.ids[found : found + min(room, self.size)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Guess more tokens after a fully correct guess, fewer after one without a correct token."""
        if guessed and right == guessed:
            self.size = min(2 * self.size, self.most)
        elif guessed and right == 0:
            self.size = max(self.size // 2, 1)
