"""Check a caller's token ids and counts. Errors are RequestErrors that state both the value and the limit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.errors import RequestError
from runtime.sampling import is_whole


def check_ids(ids: ArrayLike, vocab_size: int, context: int, used: int = 0) -> NDArray[np.int64]:
    """Token ids as int64 [n], n >= 1. Without this check the graph would read zeros for ids outside the vocabulary."""
    try:
        tokens = np.asarray(ids)
    except ValueError as error:  # ragged lists
        raise RequestError("token ids must be one flat list of whole numbers") from error
    if tokens.ndim == 1 and len(tokens) == 0:
        raise RequestError("there are no tokens: give at least one")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RequestError(f"token ids must be one flat list of whole numbers, not {tokens.dtype} {list(tokens.shape)}")
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        at = int(wrong[0])
        raise RequestError(
            f"unknown token id {tokens[at]} at position {used + at}: the vocabulary has ids 0 to {vocab_size - 1}"
        )
    if used + len(tokens) > context:
        after = f" after {used} that are already there" if used else ""
        raise RequestError(
            f"{len(tokens)} tokens{after} do not fit the context of {context}: give fewer, or let "
            "truncate (left, middle or right) cut them"
        )
    return tokens.astype(np.int64, copy=False)


def check_count(name: str, value: object, most: int | None = None) -> int:
    """A whole number from 1 to `most`."""
    if not is_whole(value) or int(value) < 1 or (most is not None and int(value) > most):  # type: ignore[call-overload]
        limit = "1 or above" if most is None else f"from 1 to {most}"
        raise RequestError(f"{name} {value!r} must be a whole number, {limit}")
    return int(value)  # type: ignore[call-overload]


def is_many(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts: texts, or lists of token ids.

    >>> is_many("abc"), is_many([1, 2]), is_many(["abc"]), is_many([[1, 2], [3]]), is_many(np.zeros((2, 3)))
    (False, False, True, True, True)
    """
    try:
        return not isinstance(prompt, str) and len(prompt[0]) >= 0
    except (TypeError, IndexError, KeyError):  # not a list, an empty one, or a list of numbers
        return False


def is_empty(prompt: Any) -> bool:
    """Whether a prompt is a list without token ids.

    >>> is_empty([]), is_empty(np.zeros(0)), is_empty([1]), is_empty(7), is_empty(np.array(7))
    (True, True, False, False, False)
    """
    try:
        return len(prompt) == 0
    except TypeError:
        return False
