"""One text in the making: which token comes next, what of the text is certain, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.lookup import MOST_SPECULATED
from runtime.manifest import Manifest
from runtime.request import check_count
from runtime.sampling import Sampler, Sampling, is_whole
from runtime.text import StopStrings, Streamer, TextCodec

END_OF_TEXT, STOP_STRING, MAX_NEW_TOKENS, CONTEXT_FULL = "end_of_text", "stop_string", "max_new_tokens", "context_full"
STOP, SLIDE = "stop", "slide"  # what to do when the context is full


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str  # the text that has become certain with it; joined, these are the whole text
    path: str  # name of the leaf that chose it
    row: int = 0  # which of several prompts it continues


@dataclass(frozen=True)
class Limits:
    """Where a text ends, and how far one run may guess ahead; raises RequestError, naming the value that cannot be."""

    max_new_tokens: int
    stop: str | Many[str] = ()
    on_full: str = STOP  # STOP: the text ends; SLIDE: the last half of the context is read again as a new beginning
    speculate: int = 0  # tokens to guess from the text so far (runtime.lookup); greedy choice only

    def __post_init__(self) -> None:
        many = isinstance(self.stop, Iterable) and not isinstance(self.stop, str)
        object.__setattr__(self, "stop", tuple(self.stop) if many else (self.stop,))
        check_count("max_new_tokens", self.max_new_tokens)
        if not all(isinstance(text, str) and text for text in self.stops):
            raise RequestError("a stop string must be a text that is not empty")
        if self.on_full not in (STOP, SLIDE):
            raise RequestError(f"on_full {self.on_full!r} must be '{STOP}' or '{SLIDE}'")
        if not (is_whole(self.speculate) and 0 <= self.speculate <= MOST_SPECULATED):
            raise RequestError(f"speculate {self.speculate!r} must be a whole number from 0 to {MOST_SPECULATED}")

    @property
    def stops(self) -> list[str]:
        return list(self.stop)


class TextModel(Protocol):
    """What a text asks of its model (runtime.model.Model)."""

    folder: Path
    manifest: Manifest
    codec: TextCodec | None
    context: int  # tokens
    ends: frozenset[int]


class Writing:
    """The text of one prompt. `ids`, `text` and `stop_reason` are complete when stop_reason is not None.

    The end-of-text token ends it and is reported like any other token, without text. A stop string ends it too
    and is cut from the text. A full context ends it unless `on_full` is "slide": the last token is then chosen when
    the context is full.
    """

    def __init__(
        self, model: TextModel, prompt: NDArray[np.int64], sampling: Sampling, limits: Limits, row: int
    ) -> None:
        """row: which of several prompts. It draws its random numbers from the seed plus its row, so that a prompt of
        a batch gets the text that it gets alone with that seed."""
        if limits.stops and model.codec is None:
            raise RequestError(f"{model.folder} has no tokenizer, so stop strings cannot be found: leave them out")
        self.model = model
        self.prompt = prompt
        self.limits = limits
        self.row = row
        self.ids: list[int] = []
        self.text = ""
        self.stop_reason: str | None = None
        self._choose = Sampler(sampling.for_row(row), prompt.tolist())
        self._streamer: Streamer | None = None if model.codec is None else model.codec.streamer()
        self._stops = StopStrings(limits.stops)

    def take(self, log_probs: NDArray[np.float32], leaf: int, used: int) -> Token:
        """Choose the next token from log-probs [vocab] of the leaf that was taken, after `used` tokens of context."""
        token = self._choose(log_probs)
        self.ids.append(token)
        piece = self._piece(token, used)
        self.text += piece
        return Token(token, piece, self.model.manifest.leaves[leaf], self.row)

    def kept(self) -> list[int]:
        """What is read again when the context is full: its last half, the newest token included."""
        return [*self.prompt.tolist(), *self.ids][-max(1, self.model.context // 2) :]

    def _piece(self, token: int, used: int) -> str:
        """The token's share of the text; sets stop_reason when it is the last."""
        if token in self.model.ends:
            self.stop_reason = END_OF_TEXT
            return self._rest()
        piece = "" if self._streamer is None else self._stops.push(self._streamer.push(token))
        if self._stops.found:
            self.stop_reason = STOP_STRING
        elif len(self.ids) >= self.limits.max_new_tokens:
            self.stop_reason = MAX_NEW_TOKENS
        elif used >= self.model.context and self.limits.on_full == STOP:
            self.stop_reason = CONTEXT_FULL
        return piece if self.stop_reason in (None, STOP_STRING) else piece + self._rest()

    def _rest(self) -> str:
        """What was held back: an unfinished character, or what might have become a stop string."""
        if self._streamer is None:
            return ""
        piece = self._stops.push(self._streamer.flush())
        return piece + self._stops.flush()
