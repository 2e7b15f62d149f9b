"""Streaming text: for any tokens, the joined pieces are the whole text, and no piece splits a character."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runtime.errors import ModelError, RequestError
from runtime.text import BYTE_OF, ByteStreamer, StopStrings, Streamer, TextCodec, WholeStreamer, overlap

BYTES = {byte: char for char, byte in BYTE_OF.items()}


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """Byte-level: token b is byte b, then merges that end inside characters, then added tokens."""
    vocab = {BYTES[byte]: byte for byte in range(256)}
    merges = [(0xE2, 0x82), (0xF0, 0x9F), (0x20, 0xC3), (0x61, 0xF0), (0x68, 0x69)]
    for first, second in merges:
        vocab[BYTES[first] + BYTES[second]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [(BYTES[a], BYTES[b]) for a, b in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False), AddedToken("字字", normalized=False)])
    path = tmp_path_factory.mktemp("codec") / "tokenizer.json"
    tokenizer.save(str(path))
    return TextCodec(path)


def pieces(streamer: Streamer, ids: Iterable[int]) -> list[str]:
    return [*(streamer.push(token) for token in ids), streamer.flush()]


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), data=st.data())
def test_any_split_of_any_text_streams_exactly(codec: TextCodec, text: str, data: st.DataObject) -> None:
    raw, ids = text.encode(), []
    while raw:  # a random tokenisation: any token whose bytes come next, half characters included
        options = [t for t in range(261) if raw.startswith(token_bytes(codec, t))]
        ids.append(data.draw(st.sampled_from(options)))
        raw = raw[len(token_bytes(codec, ids[-1])) :]
    got = pieces(codec.streamer(), ids)
    assert "".join(got) == text == codec.decode(ids)
    ends = {len(text[:n].encode()) for n in range(len(text) + 1)}
    used = 0
    for piece in got:
        used += len(piece.encode())
        assert used in ends  # always at a character's end


def token_bytes(codec: TextCodec, token: int) -> bytes:
    return bytes(BYTE_OF[char] for char in codec.tokenizer.id_to_token(token))


@given(st.lists(st.integers(0, 263), max_size=30))
def test_any_tokens_stream_to_what_decode_gives(codec: TextCodec, ids: list[int]) -> None:
    """Also byte runs that are not UTF-8, special and added tokens."""
    want = codec.decode(ids)
    streamer = codec.streamer()
    assert isinstance(streamer, ByteStreamer)
    assert "".join(pieces(streamer, ids)) == want
    assert "".join(pieces(WholeStreamer(codec), ids)) == want


def test_bytes_wait_for_their_character(codec: TextCodec) -> None:
    euro = list("€".encode())
    assert pieces(codec.streamer(), [*euro, ord("x"), *euro[:2]]) == ["", "", "€", "x", "", "", "\ufffd"]
    assert pieces(codec.streamer(), [256, euro[2]]) == ["", "€", ""]


def test_special_tokens_have_no_text_and_added_ones_do(codec: TextCodec) -> None:
    special, tag, characters = (codec.tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<tag>", "字字"))
    assert pieces(codec.streamer(), [special, tag, characters]) == ["", "<tag>", "字字", ""]


def test_other_tokenizers_stream_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "?": 3}, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json")
    assert pieces(codec.streamer(), [0, 1, 2, 0]) == ["a", " b", "c", " a", ""]


def test_encoding_then_decoding_gives_the_text(codec: TextCodec) -> None:
    text = "hi — Käse 🦔 <tag>"
    assert codec.decode(codec.encode(text)) == text
    assert codec.encode("a<|endoftext|>")[-1] == codec.tokenizer.token_to_id("<|endoftext|>")


def test_text_without_utf8_form_is_refused(codec: TextCodec) -> None:
    with pytest.raises(RequestError, match="character 2"):
        codec.encode("ab\udcff")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        TextCodec(tmp_path / "tokenizer.json")


@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=8),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_where_the_first_one_begins(parts: list[str], stops: list[str]) -> None:
    filtered = StopStrings(stops)
    shown = []
    for part in parts:
        shown.append(filtered.push(part))
        whole = "".join(parts[: len(shown)])
        found = [whole.find(stop) for stop in stops if stop in whole]
        if found:
            # the first complete stop string decides; of several, the one that begins first
            assert filtered.found
            assert "".join(shown) == whole[: min(found)]
            return
        assert not filtered.found
        held = whole[len("".join(shown)) :]
        assert whole.startswith("".join(shown))
        assert not held or any(stop.startswith(held) for stop in stops)  # no more is held back than needed
    assert "".join([*shown, filtered.flush()]) == "".join(parts)


def test_overlap_by_hand() -> None:
    assert [overlap("xa", "ab"), overlap("ab", "ab"), overlap("aab", "aabaab"), overlap("", "a")] == [1, 0, 3, 0]
