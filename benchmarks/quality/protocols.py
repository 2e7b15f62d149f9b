"""Common protocols to score a text: which tokens it has, and in which windows they are predicted.

stride-concat    the non-empty lines, stripped, tokenised one by one with one end-of-text after each, and joined.
                 Windows of `max_length` tokens advance by `stride`; each scores its last `stride` predictions, the
                 last window the rest. The first `max_length - stride` tokens are never scored, end-of-text
                 targets count. Source: the original DMPT; WikiText's raw test file, GPT-2's tokenizer and 1024/512
                 are 280,232 scored tokens of 280,744.
sliding          the rows joined by a blank line, tokenised as one text without end-of-text. Windows as above, but the
                 first scores all of its predictions, so that every token but the first is scored once. Source:
                 "Perplexity of fixed-length models" in the documentation of Hugging Face's transformers; WikiText's
                 raw test file is 287,644 tokens there and here. (The guide's own code weighs a window by one token
                 less than it scores; here the mean is over tokens.)
non-overlapping  the same text in windows that share no token, the guide's disjoint chunks: each scores all its
                 predictions, so a window's first token is never scored. `stride` is `max_length`.

Words and bytes. Each token counts the text that it stands for: the UTF-8 bytes from the previous token's end to its
own (a split character counts with its first token), and the words, separated by white space, that end in it. An
end-of-text stands for its line's newline: one byte, no word. Only scored text counts, so perplexity per word and bits
per byte compare between tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from training.errors import FieldError
from training.text.sources import read_lines, read_rows
from training.text.windows import windows as overlapping

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

STRIDE_CONCAT, NON_OVERLAPPING, SLIDING = "stride-concat", "non-overlapping", "sliding"
LONGEST_WINDOW = 1024  # the protocols' window; a longer context is only used on request
LINES_AT_ONCE = 2000
SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
BETWEEN = "\n\n"  # joins rows: a blank line


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens, and the bytes and words that each stands for; all [N]."""

    ids: NDArray[np.int32]
    n_bytes: NDArray[np.int32]
    n_words: NDArray[np.int32]


Read = Callable[[Sequence[Path], "Tokenizer", int, str], Text]


@dataclass(frozen=True)
class Protocol:
    """read: files, tokenizer, end-of-text id and field -> Text; stride: default stride for a window length."""

    read: Read
    stride: Callable[[int], int]
    beginning: bool  # whether the first window scores all its predictions
    fixed: bool = False  # whether the stride cannot be chosen


# --- text -------------------------------------------------------------------------------------------


def lines_text(paths: Sequence[Path], tokenizer: Tokenizer, eot: int, field: str) -> Text:
    """Each non-empty stripped line, then end-of-text; the same ids as training.text.windows.encode_lines."""
    parts: list[Text] = []
    lines: list[str] = []

    def flush() -> None:
        for line, encoding in zip(lines, tokenizer.encode_batch(lines), strict=True):
            parts.append(ended(spans(line, encoding), eot))
        lines.clear()

    for path in paths:
        for line in read_lines(path, None, field):
            lines.append(line)
            if len(lines) == LINES_AT_ONCE:
                flush()
    flush()
    return joined(parts)


def joined_text(paths: Sequence[Path], tokenizer: Tokenizer, eot: int, field: str) -> Text:
    """All rows joined by a blank line, as one text."""
    text = BETWEEN.join(row for path in paths for row in read_rows(path, field))
    return spans(text, tokenizer.encode(text))


def spans(text: str, encoding: Encoding) -> Text:
    """The tokens of a text with the bytes and words of each; uncovered text counts with the next or the last token."""
    ids = np.array(encoding.ids, np.int32)
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    space = np.isin(points, SPACES)
    ends = ~space & np.append(space[1:], True)[: len(points)]  # the last character of each word
    until = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64))  # characters, by token
    if len(until):
        until[-1] = len(points)
    return Text(ids, per_token(widths, until), per_token(ends, until))


def per_token(values: NDArray[np.integer | np.bool_], until: NDArray[np.int64]) -> NDArray[np.int32]:
    """Sums of per-character values over the characters of each token."""
    sums = np.concatenate([[0], np.cumsum(values)])[until]
    return np.diff(sums, prepend=0).astype(np.int32)


def ended(line: Text, eot: int) -> Text:
    return Text(*(np.append(x, np.int32(more)) for x, more in ((line.ids, eot), (line.n_bytes, 1), (line.n_words, 0))))


def joined(parts: Iterable[Text]) -> Text:
    parts = list(parts) or [Text(*(np.zeros(0, np.int32) for _ in range(3)))]
    return Text(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "n_bytes", "n_words")))


# --- windows ----------------------------------------------------------------------------------------

PROTOCOLS: dict[str, Protocol] = {
    STRIDE_CONCAT: Protocol(lines_text, lambda length: max(1, length // 2), beginning=False),
    NON_OVERLAPPING: Protocol(joined_text, lambda length: length, beginning=True, fixed=True),
    SLIDING: Protocol(joined_text, lambda length: max(1, length // 2), beginning=True),
}


def choose_windows(
    context: int, max_length: int | None, stride: int | None, protocol: str = STRIDE_CONCAT
) -> tuple[int, int]:
    """Window and stride with the protocol's defaults filled in. Raises InputError when they are impossible."""
    length = max_length or min(LONGEST_WINDOW, context)
    step = stride or PROTOCOLS[protocol].stride(length)
    if not 2 <= length <= context:
        raise FieldError("{max_length} {} must be from 2 to the model's context of {} tokens", length, context)
    if not 1 <= step <= length:
        raise FieldError("{stride} {} must be from 1 to the window's length ({max_length} {})", step, length)
    if PROTOCOLS[protocol].fixed and step != length:
        raise FieldError("{protocol} {} always has a stride of the window's length: leave {stride} out", protocol)
    return length, step


def plan(n_tokens: int, length: int, stride: int, protocol: str) -> list[tuple[int, int, int]]:
    """(start, stop, n_scored) of every window, see training.text.windows.windows; InputError when nothing is scored."""
    windows = list(overlapping(n_tokens, length, stride, PROTOCOLS[protocol].beginning))
    if not windows:
        never = 1 if PROTOCOLS[protocol].beginning else length - stride
        raise FieldError(
            "the text has {} tokens, and windows of {} advancing by {} score only those after the first {}: give a "
            "longer text or a smaller {max_length}",
            n_tokens, length, stride, never,
        )  # fmt: skip
    return windows
