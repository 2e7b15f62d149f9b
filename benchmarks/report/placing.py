"""Place labels near their markers without overlaps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y may point up or down."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> Box:
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


def best_spot(
    centre: tuple[float, float], radius: float, width: float, height: float, frame: Box, taken: Sequence[Box]
) -> Box:
    """The nearest box of the given size around a marker that overlaps least."""
    spots = []
    for extra, turn in itertools.product((4, 14, 28, 48, 72, 100), range(16)):
        angle = math.pi / 2 + turn * math.pi / 8  # straight up (or down) first
        x = centre[0] + math.cos(angle) * (radius + extra + width / 2)
        y = centre[1] + math.sin(angle) * (radius + extra + height / 2)
        spots.append(Box.around(x, y, width, height))
    return min(spots, key=lambda spot: sum(overlap(spot, box) for box in taken) + outside(spot, frame))


def overlap(a: Box, b: Box) -> float:
    """Overlap of two boxes, in pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def outside(spot: Box, frame: Box) -> float:
    """Area of `spot` outside `frame`, in pixels."""
    return spot.area - overlap(spot, frame)


def distance(centre: tuple[float, float], box: Box) -> float:
    """Distance from a point to a box, in pixels."""
    x, y = centre
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
