"""Text -> tokens -> evaluation windows. The same preprocessing for training, evaluation and calibration.

Uses only numpy and tokenizers, so that evaluating an exported model needs no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.checkpoints.atomic import atomic_file
from training.errors import InputError
from training.model.fields import tokens
from training.progress import Bar
from training.text.sources import FIELD, content_hash, read_lines
from training.text.tokenizer import END_OF_TEXT, prefix_ids

LINES_PER_BATCH = 2000  # tokenised at once: enough for the tokenizer's threads, with little memory
Source = str | Path  # a text, or the path or name of a source: see training.text.sources
SHORT_S = 0.5  # shorter work shows no progress bar


def _gpt2_form(model: models.BPE) -> Tokenizer:
    """A tokenizer with GPT-2's steps before and after its merges."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE in GPT-2's form, of at most `vocab_size` entries; the end of text is id 0.

    The same lines give the same tokenizer.
    """
    tokenizer = _gpt2_form(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, config: Any = None) -> int:
    """The id that separates texts: the first `eos_token_id` of config (an object or a mapping), else `<|endoftext|>`.

    For a config read from a folder, training.text.ends sets `eos_token_id`. Raises InputError when there is neither.
    """
    eos = config.get("eos_token_id") if isinstance(config, dict) else getattr(config, "eos_token_id", None)
    for end in [*tokens(eos), tokenizer.token_to_id(END_OF_TEXT)]:
        if end is not None and tokenizer.id_to_token(end) is not None:
            return int(end)
    raise InputError(f"the tokenizer has no {END_OF_TEXT} and the model's eos_token_id ({eos}) is not a token of it")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: object) -> None:
    """Raise InputError for a tokenizer with more tokens than the model in `folder`."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has ids up to {highest}, its model {vocab_size} tokens: "
            "they do not belong together; put the model's own tokenizer beside it"
        )


# --- tokens -----------------------------------------------------------------------------------------


def token_chunks(
    sources: Source | Iterable[Source], tokenizer: Tokenizer, eot: int, field: str = FIELD
) -> Iterator[np.ndarray]:
    """The tokens of `sources` as int32 arrays in order: each non-empty stripped line, then one `eot`."""
    items = [sources] if isinstance(sources, (str, Path)) else list(sources)
    total = sum(os.path.getsize(item) for item in items if isinstance(item, Path) and item.is_file())
    bar: dict[str, Any] = {"desc": "tokenising", "unit": "B", "unit_scale": True, "delay": SHORT_S}
    with Bar(total=total or None, **bar) as progress:
        batch: list[str] = []
        for item in items:
            for line in read_lines(item, progress, field) if isinstance(item, Path) else _lines(item):
                batch.append(line)
                if len(batch) == LINES_PER_BATCH:
                    yield _encode(batch, tokenizer, eot)
                    batch = []
        if batch:
            yield _encode(batch, tokenizer, eot)


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.split("\n") if line.strip())


def _encode(lines: list[str], tokenizer: Tokenizer, eot: int) -> np.ndarray:
    prefix = prefix_ids(tokenizer)
    encoded = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    return np.concatenate([np.array([*prefix, *encoding.ids, eot], np.int32) for encoding in encoded])


def encode_lines(sources: Source | Iterable[Source], tokenizer: Tokenizer, eot: int, field: str = FIELD) -> np.ndarray:
    """Tokens of texts (str) or of files and datasets (Path), int32 [n]: each non-empty stripped line, then `eot`.

    field: the field or column that holds the text in JSON objects and tables. Raises InputError as read_lines.
    """
    chunks = list(token_chunks(sources, tokenizer, eot, field))
    return np.concatenate(chunks) if chunks else np.empty(0, np.int32)


def first_tokens(source: Source, tokenizer: Tokenizer, eot: int, n: int, field: str = FIELD) -> np.ndarray:
    """The first `n` tokens of encode_lines(), or all if there are fewer; tokenises no more text than needed.

    Raises InputError as read_lines.
    """
    chunks, missing = [np.empty(0, np.int32)], n
    for chunk in token_chunks(source, tokenizer, eot, field):
        chunks.append(chunk[:missing])
        missing -= len(chunks[-1])
        if not missing:
            break
    return np.concatenate(chunks)


def token_cache(
    paths: Iterable[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    eot: int,
    cache_dir: str | os.PathLike[str],
    field: str = FIELD,
) -> np.memmap[Any, np.dtype[np.int32]]:
    """encode_lines() of files and datasets, cached on disk: int32 [n], read-only.

    The cache key is the content (not names or dates) and kind of the sources, the tokenizer and `eot`. The file is
    written atomically, so a killed run leaves no short cache.
    """
    sources = [Path(path) for path in paths]
    digest = hashlib.sha256(f"tokens-3 {eot} {tokenizer.to_str()}".encode())
    for path in sources:
        digest.update(content_hash(path, field))
    cached = Path(cache_dir) / f"tokens-{digest.hexdigest()[:32]}.bin"
    if not cached.is_file():
        with atomic_file(cached) as tmp, open(tmp, "wb") as out:
            for chunk in token_chunks(sources, tokenizer, eot, field):
                out.write(chunk.astype("<i4").tobytes())
    return np.memmap(cached, dtype="<i4", mode="r")


# --- evaluation windows -----------------------------------------------------------------------------


def windows(n_tokens: int, max_length: int, stride: int, beginning: bool = False) -> Iterator[tuple[int, int, int]]:
    """(start, stop, n_scored) of each evaluation window: tokens [start, stop), its last n_scored predictions count.

    Windows of `max_length` tokens advance by `stride`; each scores its last `stride` predictions, the last window
    the remaining ones. So the first `max_length - stride` tokens are never scored, and every later token exactly once
    (except a window's first token, which has no context, when stride equals max_length). A text that is not longer
    than this unscored beginning gives no window. `beginning`: the first window scores all its predictions instead.

    >>> list(windows(11, 8, 4))
    [(0, 8, 4), (4, 11, 3)]
    >>> list(windows(11, 8, 4, beginning=True))
    [(0, 8, 7), (4, 11, 3)]
    """
    if max_length < 2 or not 1 <= stride <= max_length:
        raise InputError(f"stride {stride} must be from 1 to the window's length {max_length}, and that at least 2")
    start, done = 0, 0 if beginning else max_length - stride
    while done < n_tokens:
        stop = min(start + max_length, n_tokens)
        n_scored = min(stop - done, stop - start - 1)
        if n_scored:
            yield start, stop, n_scored
        start, done = start + stride, stop
