"""Text to token ids and back. Streaming, one token at a time, never splits a UTF-8 character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from runtime.errors import ModelError, RequestError


class TextCodec:
    """The folder's tokenizer. Special tokens (end of text) are recognised in prompts and left out of decoded text."""

    def __init__(self, path: Path, prefix: Sequence[int] = ()) -> None:
        """prefix: ids in front of every text. Raises ModelError when the file is not a tokenizer."""
        self.prefix = list(prefix)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path} is not a tokenizer ({error}): export the model again") from error

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Token ids of a text. begins: False for a text that continues another one and so gets no prefix.

        Raises RequestError for text that has no UTF-8 form (lone surrogates).
        """
        utf8(text)
        return [*(self.prefix if begins else ()), *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def streamer(self) -> Streamer:
        """A new decoder for one text. For byte-level tokenizers (GPT-2) its cost per token is constant."""
        if isinstance(self.tokenizer.decoder, ByteLevel):
            return ByteStreamer(self.tokenizer)
        return WholeStreamer(self)


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid UTF-8 at character {error.start}: give it as UTF-8") from error


class Streamer(Protocol):
    """Turns tokens into pieces of text; the joined pieces equal `TextCodec.decode` of all tokens."""

    def push(self, token: int) -> str:
        """The text that one more token completes: whole characters only, often a word, sometimes ""."""

    def flush(self) -> str:
        """The rest; an unfinished character becomes U+FFFD. The streamer is then empty."""


class ByteStreamer:
    """For byte-level tokenizers, where each token stands for a run of bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token for token, entry in added.items() if entry.special}
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.utf8.decode(self.bytes_of(token))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes, by the same rule as the library's ByteLevel decoder; b"" for specials and unknown ids."""
        name = None if token in self.special else self.tokenizer.id_to_token(token)
        if name is None:
            return b""
        try:
            return bytes(BYTE_OF[char] for char in name)
        except KeyError:  # an added token, stored as plain text
            return name.encode()


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, inverted.

    Source: the GPT-2 tokenizer (Radford et al., 2019): printable Latin-1 stands for itself, the other
    bytes for the characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = byte_alphabet()


class WholeStreamer:
    """For other tokenizers: decodes all tokens so far and returns the text that is new and complete."""

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.given = ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self.hand_out(self.codec.decode(self.ids).rstrip("\ufffd"))  # may be half a character

    def flush(self) -> str:
        piece = self.hand_out(self.codec.decode(self.ids))
        self.ids, self.given = [], ""
        return piece

    def hand_out(self, text: str) -> str:
        if not text.startswith(self.given):  # returned text cannot be taken back
            return ""
        piece, self.given = text[len(self.given) :], text
        return piece


class StopStrings:
    """Cuts streamed text before the first stop string; holds back text that may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can be shown now; `found` becomes true when a stop string is complete."""
        if self.found:
            return ""
        self.held += piece
        starts = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if starts:
            self.found = True
            shown, self.held = self.held[: min(starts)], ""
            return shown
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def flush(self) -> str:
        shown, self.held = self.held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`.

    >>> overlap("a b#", "##")
    1
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
