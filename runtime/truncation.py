"""Cutting a prompt that is longer than the context."""

from __future__ import annotations

from runtime.errors import RequestError

LEFT, MIDDLE, RIGHT = "left", "middle", "right"  # where tokens are dropped
SIDES = (LEFT, MIDDLE, RIGHT)


def check_side(side: str | None) -> None:
    """Raise RequestError for an unknown side."""
    if side is not None and side not in SIDES:
        raise RequestError(f"truncate {side!r} must be one of {', '.join(SIDES)}")


def shortened(items: list[int], most: int, side: str, kept: int = 0) -> list[int]:
    """At most `most` of the items; the first `kept` always stay (a beginning-of-text token).

    >>> shortened([0, 1, 2, 3, 4, 5], 4, LEFT, kept=1), shortened([0, 1, 2, 3, 4, 5], 4, MIDDLE)
    ([0, 3, 4, 5], [0, 1, 4, 5])
    >>> shortened([0, 1, 2, 3, 4, 5], 3, RIGHT)
    [0, 1, 2]
    """
    if len(items) <= most:
        return items
    first, rest = items[:kept], items[kept:]
    room = max(most - kept, 1)
    if side == RIGHT:
        return first + rest[:room]
    head = room // 2 if side == MIDDLE else 0
    return first + rest[:head] + rest[len(rest) - (room - head) :]


def shortened_text(text: str, most: int, side: str) -> str:
    """At most `most` characters, cut where shortened() will cut the tokens, so that less text is tokenised."""
    if len(text) <= most:
        return text
    if side == RIGHT:
        return text[:most]
    if side == LEFT:
        return text[-most:]
    return text[: most // 2] + text[-(most // 2) :]
