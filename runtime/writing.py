"""One text while it is generated: the next token, the text completed so far, and when it ends."""

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
from runtime.sampling import Sampler, Sampling, is_whole, likeliest
from runtime.text import StopStrings, Streamer, TextCodec

END_OF_TEXT, STOP_STRING, MAX_NEW_TOKENS, CONTEXT_FULL = "end_of_text", "stop_string", "max_new_tokens", "context_full"
STOP, SLIDE = "stop", "slide"  # what to do when the context is full


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str  # the text that this token completes; joined, the pieces are the whole text
    path: str  # name of the leaf that chose it
    row: int = 0  # index of the prompt that it continues
    # With `logprobs`: natural logarithms of the deployed distribution, before penalty, bias and temperature.
    logprob: float | None = None  # of this token
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, log-prob) of the likeliest tokens, falling


@dataclass(frozen=True)
class Limits:
    """Where a text ends, how far one run may guess ahead, and what is reported of each token. Raises RequestError
    naming an invalid value."""

    max_new_tokens: int
    stop: str | Many[str] = ()
    on_full: str = STOP  # STOP: end the text; SLIDE: read the last half of the context again as a new beginning
    speculate: int = 0  # tokens to guess at once, by draft heads or else from the text so far (runtime.lookup)
    logprobs: int | None = None  # likeliest tokens to report with each token; 0: its own log-prob alone; None: neither

    def __post_init__(self) -> None:
        many = isinstance(self.stop, Iterable) and not isinstance(self.stop, str)
        object.__setattr__(self, "stop", tuple(self.stop) if many else (self.stop,))
        check_count("max_new_tokens", self.max_new_tokens)
        if not all(isinstance(text, str) and text for text in self.stops):
            raise RequestError("a stop string must be text and not empty")
        if self.on_full not in (STOP, SLIDE):
            raise RequestError(f"on_full {self.on_full!r} must be '{STOP}' or '{SLIDE}'")
        if not (is_whole(self.speculate) and 0 <= self.speculate <= MOST_SPECULATED):
            raise RequestError(f"speculate {self.speculate!r} must be a whole number from 0 to {MOST_SPECULATED}")
        if self.logprobs is not None and not (is_whole(self.logprobs) and self.logprobs >= 0):
            raise RequestError(f"logprobs {self.logprobs!r} must be a whole number, 0 or above")

    def check_vocabulary(self, size: int) -> None:
        """Raise RequestError for more log-probs than a vocabulary of this size has."""
        if self.logprobs is not None and self.logprobs > size:
            raise RequestError(f"logprobs {self.logprobs} is above {size}, the tokens of this model: give less")

    @property
    def stops(self) -> list[str]:
        return list(self.stop)


class TextModel(Protocol):
    """The part of runtime.model.Model that Writing uses."""

    folder: Path
    manifest: Manifest
    codec: TextCodec | None
    context: int  # tokens
    ends: frozenset[int]
    vocab_size: int


class Writing:
    """The text of one prompt. `ids`, `text` and `stop_reason` are complete when stop_reason is not None; with
    `logprobs` so is `tokens`, otherwise empty.

    The end-of-text token ends it and is reported like any other token, without text. A stop string also ends it and
    is cut from the text. A full context ends it, after one last token, unless `on_full` is "slide".
    """

    def __init__(
        self, model: TextModel, prompt: NDArray[np.int64], sampling: Sampling, limits: Limits, row: int
    ) -> None:
        """row: index of the prompt. Its seed is the batch's seed plus its row, so a prompt of a batch gets the same
        text as alone with that seed."""
        sampling.check_vocabulary(model.vocab_size)
        limits.check_vocabulary(model.vocab_size)
        if limits.stops and model.codec is None:
            raise RequestError(f"{model.folder} has no tokenizer, so stop strings cannot be matched: leave them out")
        self.model = model
        self.prompt = prompt
        self.limits = limits
        self.row = row
        self.ids: list[int] = []
        self.text = ""
        self.tokens: list[Token] = []
        self.stop_reason: str | None = None
        self._choose = Sampler(sampling.for_row(row), prompt.tolist())
        self._streamer: Streamer | None = None if model.codec is None else model.codec.streamer()
        self._stops = StopStrings(limits.stops)

    def take(self, log_probs: NDArray[np.float32], leaf: int, used: int) -> Token:
        """Choose the next token from log-probs [vocab] of the chosen leaf, with `used` tokens in the context."""
        token = self._choose(log_probs)
        self.ids.append(token)
        piece = self._piece(token, used)
        self.text += piece
        path = self.model.manifest.leaves[leaf]
        if self.limits.logprobs is None:
            return Token(token, piece, path, self.row)
        likely = likeliest(log_probs, self.limits.logprobs)
        self.tokens.append(Token(token, piece, path, self.row, float(log_probs[token]), likely))
        return self.tokens[-1]

    def kept(self) -> list[int]:
        """Tokens to read again when the context is full: its last half, including the newest token."""
        return [*self.prompt.tolist(), *self.ids][-max(1, self.model.context // 2) :]

    def _piece(self, token: int, used: int) -> str:
        """The text that the token completes; sets stop_reason at the last token."""
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
        """Text held back so far: an unfinished character, or a possible beginning of a stop string."""
        if self._streamer is None:
            return ""
        piece = self._stops.push(self._streamer.flush())
        return piece + self._stops.flush()
