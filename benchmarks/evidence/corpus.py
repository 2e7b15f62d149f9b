"""Cut the texts for training and measuring, and train a small tokenizer on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.text.sources import read_lines
from training.text.windows import train_tokenizer

# Files of the data folder
PRETRAINING, TUNING = "enwiki/train.txt.xz", "wikitext/wiki2.train.unk.txt.xz"
VALID, TEST = "wikitext/wiki.valid.raw", "wikitext/wiki.test.raw"


@dataclass(frozen=True)
class Corpus:
    """Plain text files, all lines stripped and not empty."""

    base: Path  # training text of the base model
    tune: Path  # training text of every variant after that; shares no line with `base`
    valid: Path
    test: Path
    tokenizer: Path  # folder


def prepare(data: Path, work: Path, sizes: dict[str, int], vocab_size: int) -> Corpus:
    """Write the slices and the tokenizer to `work`, unless an earlier call with the same sizes made them.

    sizes: bytes of text of `base`, `tune`, `tune_wiki2` (added to `tune`), `valid` and `test`, each from the start of
    its source (`tune` from the end of `base`); a shorter source is used in full. Raises InputError when a source is
    missing.
    """
    folder = work / "text"
    base_file, tune_file, valid_file, test_file = (folder / f"{name}.txt" for name in ("base", "tune", "valid", "test"))
    corpus = Corpus(base_file, tune_file, valid_file, test_file, work / "tokenizer")
    if (corpus.tokenizer / "tokenizer.json").is_file():
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    base, tune = slices(data / PRETRAINING, [sizes["base"], sizes["tune"]])
    [wiki2] = slices(data / TUNING, [sizes["tune_wiki2"]])
    [valid], [test] = slices(data / VALID, [sizes["valid"]]), slices(data / TEST, [sizes["test"]])
    for path, lines in ((corpus.base, base), (corpus.tune, tune + wiki2), (corpus.valid, valid), (corpus.test, test)):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus.tokenizer.mkdir(exist_ok=True)
    train_tokenizer(base, vocab_size).save(str(corpus.tokenizer / "tokenizer.json"))
    return corpus


def slices(source: Path, sizes: list[int]) -> list[list[str]]:
    """Consecutive runs of whole lines of a text file, each of at least the given bytes of text, including line ends."""
    out: list[list[str]] = [[] for _ in sizes]
    number, left = 0, sizes[0]
    for line in read_lines(source):
        while left <= 0:
            number += 1
            if number == len(sizes):
                return out
            left = sizes[number]
        out[number].append(line)
        left -= len(line.encode()) + 1
    return out
