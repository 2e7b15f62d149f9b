"""Choose one option per group: the least damage within a size, for every size at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUCKETS = 20_000  # resolution of sizes; a plan may waste up to one bucket per group


class Frontier:
    """The least damage for every size up to `limit` bytes, by dynamic programming (multiple-choice knapsack).

    options: the (bytes, damage) pairs of each group, of which one is chosen; damages add up. Sizes are rounded up to
    limit / BUCKETS bytes, so a plan never exceeds its size; with limit up to BUCKETS it is exact.
    Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.
    """

    def __init__(self, options: Sequence[Sequence[tuple[int, float]]], limit: int) -> None:
        self.options = options
        self.bucket = max(1, -(-limit // BUCKETS))
        n = limit // self.bucket + 1
        best = np.zeros(n)  # least damage of the groups so far, by number of buckets
        self.choices = np.empty((len(options), n), np.int8)
        for g, pairs in enumerate(options):
            trials = np.full((len(pairs), n), np.inf)
            for i, (size, damage) in enumerate(pairs):
                steps = self._buckets(size)
                if steps < n:
                    trials[i, steps:] = best[: n - steps] + damage
            self.choices[g] = trials.argmin(0)
            best = trials.min(0)
        self.damages = best

    def _buckets(self, size: int) -> int:
        return -(-size // self.bucket)

    def within(self, size: int) -> list[int] | None:
        """The option of each group with the least damage in `size` bytes; None if nothing fits."""
        left = min(size // self.bucket, len(self.damages) - 1)
        if size < 0 or not np.isfinite(self.damages[left]):
            return None
        chosen = []
        for g in reversed(range(len(self.options))):
            chosen.append(int(self.choices[g, left]))
            left -= self._buckets(self.options[g][chosen[-1]][0])
        return chosen[::-1]

    def smallest(self, damage: float) -> list[int] | None:
        """The smallest options whose damage is at most `damage`; None if there are none."""
        fits = self.damages <= damage
        return self.within(int(fits.argmax()) * self.bucket) if fits.any() else None
