"""The generation loop: choose a token, show its text, feed it back, until something says stop."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.request import check_count
from runtime.sampling import Sampler, Sampling
from runtime.text import StopStrings, Streamer

if TYPE_CHECKING:
    from runtime.model import Model

END_OF_TEXT, STOP_STRING, MAX_NEW_TOKENS, CONTEXT_FULL = "end_of_text", "stop_string", "max_new_tokens", "context_full"


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str  # the text that has become certain with it; joined, these are the whole text
    path: str  # name of the leaf that chose it


class Generation:
    """One text in the making; iterate over it to make it. Afterwards `ids`, `text` and `stop_reason` are complete.

    The end-of-text token ends it and is reported like any other token, without text. A stop string ends it too
    and is cut from the text. The context's end stops it: the last token is chosen when the context is full.
    """

    def __init__(
        self,
        model: Model,
        prompt: NDArray[np.int64],
        sampling: Sampling,
        max_new_tokens: int,
        stop: str | Many[str] = (),
    ) -> None:
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise RequestError("a stop string must be a text that is not empty")
        if stops and model.codec is None:
            raise RequestError(f"{model.folder} has no tokenizer, so stop strings cannot be found: leave them out")
        self.model = model
        self.prompt = prompt
        self.sampling = sampling
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.ids: list[int] = []
        self.text = ""
        self.stop_reason: str | None = None
        self._streamer: Streamer | None = None if model.codec is None else model.codec.streamer()
        self._stops = StopStrings(stops)

    def __iter__(self) -> Iterator[Token]:
        if self.ids:
            raise RequestError("this text is already made: ask for a new one")
        sampler = Sampler(self.sampling, self.prompt.tolist())
        sequence = self.model.sequence()
        log_probs = np.empty((1, self.model.vocab_size), np.float32)
        routes = sequence.run(self.prompt, log_probs)
        while True:
            token = sampler(log_probs[0])
            self.ids.append(token)
            piece = self._take(token, sequence.length)
            self.text += piece
            yield Token(token, piece, self.model.manifest.leaves[routes[0]])
            if self.stop_reason is not None:
                return
            routes = sequence.run([token], log_probs)

    def _take(self, token: int, used: int) -> str:
        """The token's share of the text; sets stop_reason when it is the last."""
        if token == self.model.end_of_text:
            self.stop_reason = END_OF_TEXT
            return self._rest()
        piece = "" if self._streamer is None else self._stops.push(self._streamer.push(token))
        if self._stops.found:
            self.stop_reason = STOP_STRING
        elif len(self.ids) >= self.max_new_tokens:
            self.stop_reason = MAX_NEW_TOKENS
        elif used >= self.model.context:
            self.stop_reason = CONTEXT_FULL
        return piece if self.stop_reason in (None, STOP_STRING) else piece + self._rest()

    def _rest(self) -> str:
        """What was held back: an unfinished character, or what might have become a stop string."""
        if self._streamer is None:
            return ""
        piece = self._stops.push(self._streamer.flush())
        return piece + self._stops.flush()
