"""From tokens to choices, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from runtime.model import Model
from runtime.server.writer import Scores, Written
from runtime.text import ByteStreamer, TextCodec
from runtime.writing import CONTEXT_FULL, END_OF_TEXT, MAX_NEW_TOKENS, STOP_STRING

LENGTH = "length"
REASONS = {END_OF_TEXT: "stop", STOP_STRING: "stop", MAX_NEW_TOKENS: LENGTH, CONTEXT_FULL: LENGTH}
Logprobs = dict[str, list[Any]]


class Names:
    """What stands for a token in log-probs: its text, `bytes:\\xe2\\x82` for a part of a character, or its number."""

    def __init__(self, codec: TextCodec | None) -> None:
        self.codec = codec
        self.bytes = codec.streamer() if codec is not None else None

    def __call__(self, token: int) -> str:
        if self.codec is None:
            return f"token_id:{token}"
        if not isinstance(self.bytes, ByteStreamer) or token in self.bytes.special:
            text: str = self.codec.tokenizer.decode([token], skip_special_tokens=False)
            return text or f"token_id:{token}"
        raw = self.bytes.bytes_of(token)
        try:
            return raw.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Choice:
    """One text of an answer. part() is called with its tokens, all at once or as they come."""

    def __init__(self, model: Model, names: Names, index: int, wants_logprobs: bool) -> None:
        self.model, self.names, self.index, self.wants_logprobs = model, names, index, wants_logprobs
        self.offset = 0  # characters so far
        self.prompt: tuple[str, list[int], Scores | None] | None = None  # what to echo with the first part
        self.tokens = 0
        self.done = False

    def part(self, written: Iterable[Written], ended: bool = False) -> dict[str, Any]:
        """What these tokens add. ended: the text was cut off after them."""
        text, reason, logprobs = "", LENGTH if ended else None, blank() if self.wants_logprobs else None
        if self.prompt is not None:
            text = self.echo(*self.prompt, logprobs)
            self.prompt = None
        for step in written:
            token = step.token
            if logprobs is not None and token.logprob is not None:
                self.add(logprobs, token.id, token.logprob, token.top_logprobs)
            text += token.text
            self.offset += len(token.text)
            self.tokens += 1
            reason = reason if step.reason is None else REASONS[step.reason]
        self.done = reason is not None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def echo(self, text: str, ids: list[int], scores: Scores | None, logprobs: Logprobs | None) -> str:
        """The prompt's text; its log-probs are added."""
        if scores is not None and logprobs is not None:
            streamer = None if self.model.codec is None else self.model.codec.streamer()
            for token, logprob, top in zip(ids, scores.logprobs, scores.top, strict=True):
                self.add(logprobs, token, logprob, top)
                self.offset += 0 if streamer is None else len(streamer.push(token))
        self.offset = len(text)
        return text

    def add(self, logprobs: Logprobs, token: int, logprob: float | None, top: Iterable[tuple[int, float]]) -> None:
        likely = None
        if logprob is not None:  # the first token of a prompt has none
            likely = {self.names(other): value for other, value in reversed([*top])} | {self.names(token): logprob}
        logprobs["tokens"].append(self.names(token))
        logprobs["token_logprobs"].append(logprob)
        logprobs["top_logprobs"].append(likely)
        logprobs["text_offset"].append(self.offset)


def blank() -> Logprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def server_sent(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
