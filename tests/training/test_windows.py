"""Reading text, tokens, the token cache and the evaluation windows."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.helpers.paths import SHARED_DATA
from training.errors import InputError
from training.text import windows
from training.text.sources import read_lines, read_text
from training.text.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


# --- tokenizer ------------------------------------------------------------------------------------


def test_vocab_and_merges_give_the_same_tokenizer_as_the_ready_file(
    tokenizer_folder: Path, tokenizer: Tokenizer, tmp_path: Path, sample_text: str
) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    built = load_tokenizer(tmp_path)
    for text in (sample_text, "a<|endoftext|>b", " leading", "naïve £ – 東京 🎈", ""):
        assert built.encode(text).ids == tokenizer.encode(text).ids
        assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text
    assert built.encode("a<|endoftext|>b").ids.count(0) == 1  # special, not spelled out


def test_built_tokenizer_equals_that_of_transformers(tokenizer_folder: Path, tmp_path: Path, sample_text: str) -> None:
    from transformers import GPT2TokenizerFast

    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    theirs = GPT2TokenizerFast.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode(sample_text).ids == theirs(sample_text)["input_ids"]


def test_truncation_and_padding_in_the_file_do_not_cut_the_text(
    tokenizer: Tokenizer, tmp_path: Path, sample_text: str
) -> None:
    whole = tokenizer.encode(sample_text).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(sample_text).ids == whole


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer"),
        ({"vocab.json": "{}"}, "has no tokenizer"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": '{"version": "1.0"}'}, "cannot be read"),
        ({"vocab.json": "[1]", "merges.txt": ""}, "JSON object"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "cannot be read"),
    ],
)
def test_damaged_tokenizer_is_one_clear_error(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_end_of_text_is_the_models_else_the_token_of_that_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert windows.end_of_text_id(tokenizer, {"eos_token_id": 7}) == 7
    assert windows.end_of_text_id(tokenizer, {"eos_token_id": [7, 0]}) == 7
    assert windows.end_of_text_id(tokenizer, {"eos_token_id": None}) == 0
    assert windows.end_of_text_id(tokenizer, {"eos_token_id": 5000}) == 0
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []
    plain["model"]["vocab"] = {("</s>" if token == windows.END_OF_TEXT else token): i
                               for token, i in plain["model"]["vocab"].items()}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    other = load_tokenizer(tmp_path)

    class Config:
        eos_token_id = 0

    assert windows.end_of_text_id(other, Config()) == 0
    for config in (None, {}, {"eos_token_id": 5000}):
        with pytest.raises(InputError, match="eos_token_id"):
            windows.end_of_text_id(other, config)


# --- reading ----------------------------------------------------------------------------------------

TEXT = " = One =\r\n\n  naïve – 東京  \n\t\nlast without newline"
LINES = ["= One =", "naïve – 東京", "last without newline"]
PACKED = {"plain.txt": lambda b: b, "a.xz": lzma.compress, "b.gz": gzip.compress, "C.GZ": gzip.compress}


@pytest.mark.parametrize("name", PACKED)
def test_plain_and_packed_files_read_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[name](TEXT.encode()))
    assert read_text(path) == TEXT
    assert list(read_lines(path)) == LINES


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo")
    assert read_text(path) == "one\ntwo"
    assert list(read_lines(path)) == ["one", "two"]


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "separators.txt"
    path.write_text("a\u2028b\x0cc\x85d\n", encoding="utf-8")
    assert list(read_lines(path)) == ["a\u2028b\x0cc\x85d"]


def packed(text: bytes, cut: int) -> bytes:
    return lzma.compress(text)[:-cut]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\r\n", "is empty"),
        ("latin.txt", b"fine\nna\xefve\n", "not UTF-8"),
        ("utf16.txt", "text\n".encode("utf-16"), "not UTF-8"),
        ("cut.xz", packed(b"text\n" * 500, 20), "is damaged"),
        ("plain.xz", b"no xz at all\n", "is damaged"),
        ("cut.gz", gzip.compress(os.urandom(500))[:-20], "is damaged"),
        ("plain.gz", b"no gzip at all\n", "cannot be read|is damaged"),
        ("folder", "folder", "is a folder: give a file"),
    ],
)
def test_bad_data_file_is_one_clear_error(name: str, content: bytes | str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    for read in (read_text, lambda p: list(read_lines(p))):
        with pytest.raises(InputError, match=message) as caught:
            read(path)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_not_utf8_names_the_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(InputError, match=r"line 2, byte 2 \(0xef\)"):
        list(read_lines(path))


# --- tokens -----------------------------------------------------------------------------------------


def slow_tokens(text: str, tokenizer: Tokenizer, eot: int) -> list[int]:
    """The protocol, implemented literally."""
    out: list[int] = []
    for line in text.split("\n"):
        if line.strip():
            out += tokenizer.encode(line.strip()).ids
            out.append(eot)
    return out


@pytest.mark.parametrize("n", [0, 1, 20, 10_000])
def test_first_tokens_are_those_of_the_whole_text_and_the_rest_is_not_read(
    n: int, tokenizer: Tokenizer, tmp_path: Path, sample_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = windows._encode
    monkeypatch.setattr(windows, "LINES_PER_BATCH", 1)
    monkeypatch.setattr(windows, "_encode", lambda lines, *more: read.append(len(lines)) or real(lines, *more))
    (tmp_path / "text").write_text(sample_text)
    got = windows.first_tokens(tmp_path / "text", tokenizer, 0, n)
    assert sum(read) <= 2 or n > 20  # lines
    want = windows.encode_lines(tmp_path / "text", tokenizer, 0)
    assert got.dtype == np.int32
    assert got.tolist() == want[:n].tolist()
    assert 20 < len(want) < 10_000


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    known = tokenizer.get_vocab_size()
    windows.check_vocabulary(tokenizer, known, "here")
    with pytest.raises(InputError, match=f"in here has ids up to {known - 1}, its model {known - 1} tokens"):
        windows.check_vocabulary(tokenizer, known - 1, "here")


def test_encode_lines_follows_the_protocol(tokenizer: Tokenizer, tmp_path: Path, sample_text: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(sample_text, encoding="utf-8")
    wanted = slow_tokens(sample_text, tokenizer, 0)
    for sources in (sample_text, path, [path], [sample_text]):
        tokens = windows.encode_lines(sources, tokenizer, 0)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == wanted
    assert windows.encode_lines([path, "more"], tokenizer, 0).tolist() == wanted + tokenizer.encode("more").ids + [0]
    assert windows.encode_lines("", tokenizer, 0).shape == (0,)


def test_batches_leave_no_seam(tokenizer: Tokenizer, sample_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = windows.encode_lines(sample_text, tokenizer, 0)
    for size in (1, 2, 3):
        monkeypatch.setattr(windows, "LINES_PER_BATCH", size)
        np.testing.assert_array_equal(windows.encode_lines(sample_text, tokenizer, 0), whole)


def test_token_cache_is_made_once_and_keyed_by_content(
    tokenizer: Tokenizer, tmp_path: Path, sample_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, cache = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "deep" / "cache"
    a.write_text(sample_text, encoding="utf-8")
    b.write_text("another text\n")
    first = windows.token_cache([a, b], tokenizer, 0, cache)
    np.testing.assert_array_equal(first, windows.encode_lines([a, b], tokenizer, 0))
    assert isinstance(first, np.memmap)
    assert not first.flags.writeable

    made = []
    real = windows.token_chunks
    monkeypatch.setattr(windows, "token_chunks", lambda *args: made.append(1) or real(*args))
    windows.token_cache([a, b], tokenizer, 0, cache)
    a.rename(tmp_path / "renamed.txt")
    windows.token_cache([tmp_path / "renamed.txt", b], tokenizer, 0, cache)
    assert made == []  # same content, whatever the name
    windows.token_cache([b, tmp_path / "renamed.txt"], tokenizer, 0, cache)
    windows.token_cache([b], tokenizer, 0, cache)
    windows.token_cache([b], tokenizer, 1, cache)
    b.write_text("another text.\n")
    windows.token_cache([b], tokenizer, 1, cache)
    tokenizer.add_tokens(["mill"])
    windows.token_cache([b], tokenizer, 1, cache)
    assert len(made) == 5  # order, files, end-of-text, content and tokenizer all count


def test_failed_token_cache_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad, cache = tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / "cache"
    good.write_text("fine\n" * 10)
    bad.write_bytes(b"fine\n\xff\n")
    monkeypatch.setattr(windows, "LINES_PER_BATCH", 2)
    with pytest.raises(InputError, match=r"bad\.txt is not UTF-8"):
        windows.token_cache([good, bad], tokenizer, 0, cache)
    assert not cache.exists()
    with pytest.raises(InputError, match="does not exist"):
        windows.token_cache([tmp_path / "none.txt"], tokenizer, 0, cache)


# --- windows ----------------------------------------------------------------------------------------


def test_windows_of_the_original_readme() -> None:
    spans = list(windows.windows(280_744, 1024, 512))
    assert sum(scored for _, _, scored in spans) == 280_232
    assert spans[0] == (0, 1024, 512)
    assert spans[-1] == (279_552 + 512, 280_744, 280_744 - 280_064 - 512)
    assert {stop - start for start, stop, _ in spans[:-1]} == {1024}


@given(n=st.integers(0, 400), length=st.integers(2, 64), stride=st.integers(1, 64))
def test_every_later_token_is_scored_once_with_all_its_context(n: int, length: int, stride: int) -> None:
    if stride > length:
        with pytest.raises(InputError, match="stride"):
            list(windows.windows(n, length, stride))
        return
    scored: list[int] = []
    for i, (start, stop, count) in enumerate(windows.windows(n, length, stride)):
        assert start == i * stride
        assert 0 < stop - start <= length
        assert stop <= n
        assert 1 <= count <= stop - start - 1  # a prediction needs a token before it
        scored += range(stop - count, stop)
    unscored = {t for t in range(0, n, stride)} if stride == length else set()  # noqa: C416
    assert scored == [t for t in range(length - stride, n) if t not in unscored]


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (0, 0), (8, 0), (8, 9), (8, -1)])
def test_impossible_windows_are_refused(length: int, stride: int) -> None:
    with pytest.raises(InputError, match="stride"):
        list(windows.windows(100, length, stride))


# --- the real text ----------------------------------------------------------------------------------


def test_wikitext_counts_of_the_original_readme() -> None:
    text, tokenizer_folder = SHARED_DATA / "wikitext" / "wiki.test.raw", SHARED_DATA / "gpt2-tokenizer"
    if not text.is_file() or not tokenizer_folder.is_dir():
        pytest.skip(f"no WikiText test file and GPT-2 tokenizer under {SHARED_DATA}")
    tokenizer = load_tokenizer(tokenizer_folder)
    eot = windows.end_of_text_id(tokenizer)
    tokens = windows.encode_lines(text, tokenizer, eot)
    assert (eot, len(tokens), int((tokens == eot).sum())) == (50_256, 280_744, 2_891)
    assert sum(scored for _, _, scored in windows.windows(len(tokens), 1024, 512)) == 280_232


def test_importing_data_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, training.text.windows; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
