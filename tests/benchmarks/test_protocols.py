"""The protocols against slow loops written from their texts, and the counts of words and bytes."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.perplexity import evaluate, read_text
from benchmarks.quality.protocols import NON_OVERLAPPING, PROTOCOLS, SLIDING, choose_windows, plan, spans
from tests.helpers.bench_fakes import FakeScorer, uniform
from tests.helpers.paths import SHARED_DATA
from training.errors import InputError
from training.text.tokenizer import load_tokenizer
from training.text.windows import encode_lines


def log_prob(model: Any, before: list[int], target: int) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([before])).logits[0, -1].log_softmax(-1)[target])


def slow_sliding(model: Any, ids: list[int], max_length: int, stride: int) -> list[float]:
    """From the guide's text: the window slides by the stride, and what an earlier one has scored is context only.

    "we will move the context by larger strides ... this allows computation to proceed much faster while still giving
    the model a large context to make predictions at each step."
    """
    losses, scored = [], {0}  # nothing comes before the first token
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        for target in range(begin + 1, end):
            if target not in scored:
                scored.add(target)
                losses.append(-log_prob(model, ids[begin:target], ids[target]))
        if end == len(ids):
            break
    return losses


def slow_chunks(model: Any, ids: list[int], max_length: int) -> list[float]:
    """From the guide's text: disjoint chunks, each for itself; its first token has nothing before it."""
    chunks = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [-log_prob(model, chunk[:i], chunk[i]) for chunk in chunks for i in range(1, len(chunk))]


@pytest.mark.parametrize(
    ("protocol", "max_length", "stride"), [(SLIDING, 64, 32), (SLIDING, 30, 7), (SLIDING, 48, 48),
                                           (NON_OVERLAPPING, 64, None), (NON_OVERLAPPING, 33, None)]
)  # fmt: skip
def test_a_gpt2_folder_scores_as_the_slow_loop(
    protocol: str, max_length: int, stride: int | None, tiny_gpt2: Path, sample_text: str, tmp_path: Path
) -> None:
    from transformers import GPT2LMHeadModel, GPT2TokenizerFast

    (tmp_path / "text").write_text(sample_text[:700], encoding="utf-8")
    scorer = open_scorer(tiny_gpt2)
    text = read_text(scorer, [tmp_path / "text"], protocol=protocol)
    rows = [line + "\n" if line.strip() else "" for line in sample_text[:700].split("\n")]
    rows[-1] = rows[-1].rstrip("\n")  # the file ends there without a newline
    rows = rows[: len(rows) if rows[-1] else -1]
    ids = GPT2TokenizerFast(tokenizer_file=str(tiny_gpt2 / "tokenizer.json"))("\n\n".join(rows)).input_ids
    assert text.ids.tolist() == ids
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval().double()
    losses = slow_sliding(model, ids, max_length, stride) if stride else slow_chunks(model, ids, max_length)
    found = evaluate(scorer, text, max_length, stride, protocol)
    assert found.tokens_scored == len(losses)
    np.testing.assert_allclose(found.nll, losses, rtol=1e-4)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)


@given(n=st.integers(0, 60), length=st.integers(2, 12), stride=st.integers(1, 12))
def test_sliding_scores_every_token_but_the_first_once(n: int, length: int, stride: int) -> None:
    if n < 2 or stride >= length:
        return
    windows = plan(n, length, stride, SLIDING)
    assert [i for _, stop, k in windows for i in range(stop - k, stop)] == list(range(1, n))
    assert all(stop - start <= length and k < stop - start + (start > 0) for start, stop, k in windows)


def test_non_overlapping_takes_no_other_stride() -> None:
    assert choose_windows(64, None, None, NON_OVERLAPPING) == (64, 64)
    with pytest.raises(InputError, match="leave stride out"):
        choose_windows(64, 64, 32, NON_OVERLAPPING)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_uniform_model_scores_the_vocabulary(protocol: str) -> None:
    found = evaluate(FakeScorer(uniform(97), 97), np.arange(500) % 97, protocol=protocol)
    assert found.mean_nll == pytest.approx(math.log(97), rel=1e-7)
    targets = found.tokens_scored
    assert found.top5_accuracy is not None
    assert abs(found.top5_accuracy - 5 / 97) < 6 / targets
    with pytest.raises(InputError, match="longer text"):
        evaluate(FakeScorer(uniform(97), 97), np.arange(1), protocol=protocol)


def test_wikitext_is_as_long_as_the_guide_says() -> None:
    text, folder = SHARED_DATA / "wikitext" / "wiki.test.raw", SHARED_DATA / "gpt2-tokenizer"
    if not (text.is_file() and (folder / "vocab.json").is_file()):
        pytest.skip("WikiText and GPT-2's tokenizer are not beside the repository (../shared/data)")
    tokenizer = load_tokenizer(folder)
    joined = PROTOCOLS[SLIDING].read([text], tokenizer, 50256, "text")
    assert len(joined.ids) == 287_644
    lines = PROTOCOLS["stride-concat"].read([text], tokenizer, 50256, "text")
    assert len(lines.ids) == 280_744
    assert int(lines.n_words.sum()) == int(joined.n_words.sum()) == len(text.read_text(encoding="utf-8").split())


# --- words and bytes --------------------------------------------------------------------------------


def test_lines_are_read_as_in_training(tokenizer_folder: Path, sample_text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    (tmp_path / "text").write_text(sample_text, encoding="utf-8")
    text = PROTOCOLS["stride-concat"].read([tmp_path / "text"], tokenizer, 0, "text")
    assert text.ids.tolist() == encode_lines(sample_text, tokenizer, 0).tolist()
    lines = [line.strip() for line in sample_text.split("\n") if line.strip()]
    assert int(text.n_bytes.sum()) == sum(len(line.encode()) + 1 for line in lines)
    assert int(text.n_words.sum()) == len(sample_text.split())
    ends = np.flatnonzero(text.ids == 0)
    assert text.n_bytes[ends].tolist() == [1] * len(lines)
    starts = [0, *(ends[:-1] + 1)]
    assert [int(text.n_words[a:b].sum()) for a, b in zip(starts, ends, strict=True)] == [len(x.split()) for x in lines]


@given(text=st.text(alphabet="ab \n\t\u00a0é–漢\U0001f600", max_size=40))
def test_every_byte_and_word_belongs_to_one_token(text: str) -> None:
    tokenizer = byte_tokenizer()
    parts = spans(text, tokenizer.encode(text))
    assert int(parts.n_bytes.sum()) == len(text.encode())
    assert int(parts.n_words.sum()) == len(text.split())
    assert (parts.n_bytes >= 0).all()


def byte_tokenizer() -> Tokenizer:
    """A token for each byte: characters are cut into several."""
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def alike(row: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.tile(row, (len(ids), 1))


def test_tokenizers_compare_by_bytes_and_words(tmp_path: Path, tokenizer_folder: Path, sample_text: str) -> None:
    """A model that gives every byte eight bits, through a tokenizer of bytes and one of pieces."""
    (tmp_path / "text").write_text(sample_text, encoding="utf-8")
    found = []
    for tokenizer in (byte_tokenizer(), load_tokenizer(tokenizer_folder)):
        lengths = np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])
        lengths[0] = 1  # end-of-text stands for a newline

        nats = (-8 * math.log(2) * lengths).astype(np.float32)
        fake = FakeScorer(partial(alike, nats), len(lengths), tokenizer=tokenizer)
        found.append(evaluate(fake, read_text(fake, [tmp_path / "text"]), 64, 64))  # all but windows' first tokens
    for quality in found:
        assert quality.bits_per_byte == pytest.approx(8, rel=1e-3)
        bits = 8 * len(sample_text.encode()) / len(sample_text.split())  # a word; newlines and spaces are paid for, too
        assert quality.word_perplexity is not None
        assert math.log2(quality.word_perplexity) == pytest.approx(bits, rel=0.05)
    assert found[0].perplexity != pytest.approx(found[1].perplexity, rel=0.1)
