"""The demo's corpus: large enough, the same every time, and nothing held out is trained on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from dmpt_export.demo.corpus import (
    HELD_OUT,
    MIN_BYTES,
    Corpus,
    Document,
    block_comments,
    documentation_corpus,
    paragraphs,
    source_entries,
    split,
    text_corpus,
)
from training.errors import InputError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return documentation_corpus()


def test_size_and_share(corpus: Corpus) -> None:
    assert corpus.n_bytes >= MIN_BYTES
    share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
    assert HELD_OUT * 0.7 < share < HELD_OUT * 1.5


def test_another_process_builds_the_same(corpus: Corpus) -> None:
    code = (
        "import hashlib; from dmpt_export.demo.corpus import documentation_corpus as d; c = d();"
        "print(hashlib.sha256(f'{c.train}|{c.held_out}'.encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == hashlib.sha256(f"{corpus.train}|{corpus.held_out}".encode()).hexdigest()


def test_no_line_is_on_both_sides(corpus: Corpus) -> None:
    train, held_out = (
        {line for line in side.split("\n") if line} for side in (corpus.train, corpus.held_out)
    )  # fmt: skip
    assert held_out
    assert not train & held_out


def test_no_run_of_twenty_words_repeats_half_of_a_held_out_line(corpus: Corpus) -> None:
    """An independent look at near-duplicates: word runs compared as text, per line."""
    words = " ".join(corpus.train.lower().split())
    for line in corpus.held_out.split("\n")[::10]:
        tokens = line.lower().split()
        runs = [" ".join(tokens[i : i + 20]) for i in range(0, len(tokens) - 19, 20)]
        assert sum(run in words for run in runs) <= len(runs) / 2 + 1, line


def test_groups_stay_together() -> None:
    documents = [Document(f"pkg{i}.mod{j}", [("", f"package {i} module {j}")]) for i in range(200) for j in range(2)]
    corpus = split(documents, seed=3, held_out=0.1)
    sides = [{line.split()[1] for line in side.split("\n") if line} for side in (corpus.train, corpus.held_out)]
    assert not sides[0] & sides[1]
    assert 15 <= len(sides[1]) <= 25
    assert Document("_pydecimal", []).group == Document("_decimal", []).group == Document("decimal.x", []).group


def test_near_duplicates_are_left_out() -> None:
    text = "the quick brown fox jumps over the lazy dog while the cat looks on in wonder"
    documents = [Document(f"m{i}", [("", f"unique words of module number {i}")]) for i in range(100)]
    planted = [Document(f"m{i}", [("", f"{text} {i}")]) for i in range(100)]
    corpus = split(documents + planted, seed=0, held_out=0.2)
    assert text in corpus.train
    assert text not in corpus.held_out
    assert "unique words" in corpus.held_out


def test_entries_come_in_the_order_of_the_source() -> None:
    source = (
        '"""Module."""\n# a comment of rather more than eight words\n# over two lines\nclass A(B):\n    """Class."""\n'
    )
    source += '    def f(self, x: int = 1) -> int:\n        """Method."""\n# short\n'
    assert source_entries(source) == [
        ("", "Module."),
        ("", "a comment of rather more than eight words\nover two lines"),
        ("class A(B)", "Class."),
        ("def f(self, x: int=1)", "Method."),
    ]
    assert list(block_comments("x = 1  # not a block, however many words it may have in it")) == []


def test_paragraphs_are_joined_and_examples_are_not() -> None:
    text = "One\ntwo.\n\n=====\n\n>>> f(1)\n2\n\n   Three\n   four."
    assert list(paragraphs(text)) == ["One two.", ">>> f(1)", "2", "Three four."]


def test_own_text() -> None:
    corpus = text_corpus({"a.txt": "\n".join(f"line number {i} of the text" for i in range(1000))})
    assert len(corpus.train) > 20 * len(corpus.held_out) * 0.7
    assert corpus.held_out
    with pytest.raises(InputError, match="too little text"):
        text_corpus({"a.txt": "one line\n"})
