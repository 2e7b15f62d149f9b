"""Text -> tokens -> evaluation windows. One preprocessing for training, evaluation and calibration.

Numpy and tokenizers only, so that evaluating an exported model needs no torch.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm

from training.atomic import atomic_file
from training.errors import InputError
from training.files import first_line, read_json

END_OF_TEXT = "<|endoftext|>"
LINES_PER_BATCH = 2000  # tokenised at once: enough for the tokenizer's threads, little in memory

# suffix -> how to read the bytes inside; no entry: the file itself
OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".xz": lzma.open,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
}
Source = str | Path  # a text, or the path of a text file


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Truncation and padding stored in the file are switched off. Raises InputError when there is none.
    """
    folder = Path(folder)
    ready, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if ready.is_file():
            tokenizer = Tokenizer.from_file(str(ready))
        elif vocab.is_file() and merges.is_file():
            tokenizer = _byte_level_bpe(vocab, merges)
        else:
            raise InputError(f"{folder} has no tokenizer: put tokenizer.json (or vocab.json and merges.txt) there")
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        raise InputError(f"the tokenizer in {folder} cannot be read ({first_line(error)}): replace it") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's tokenizer from its two files, the same as the fast tokenizer that transformers makes of them."""
    ids = read_json(vocab)
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in ids:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, config: Any = None) -> int:
    """The id that ends a text: `<|endoftext|>`, else `eos_token_id` of config (an object or a mapping).

    Raises InputError when the tokenizer has neither.
    """
    eot = tokenizer.token_to_id(END_OF_TEXT)
    if eot is not None:
        return int(eot)
    eos = config.get("eos_token_id") if isinstance(config, dict) else getattr(config, "eos_token_id", None)
    if isinstance(eos, int) and tokenizer.id_to_token(eos) is not None:
        return eos
    raise InputError(f"the tokenizer has no {END_OF_TEXT} and the model's eos_token_id ({eos}) is no token of it")


# --- reading ----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as it lies on disk (for progress) and the bytes inside it. Turns read errors into InputError."""
    try:
        with open(path, "rb") as raw:
            opener = OPENERS.get(path.suffix.lower())
            yield raw, (io.BufferedReader(opener(raw), 1 << 20) if opener else raw)
    except FileNotFoundError:
        raise InputError(f"data file {path} does not exist: check the path") from None
    except (lzma.LZMAError, zlib.error, EOFError) as error:
        raise InputError(f"data file {path} is damaged ({first_line(error)}): unpack or fetch it again") from error
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror or first_line(error)}") from error


def read_lines(path: str | os.PathLike[str], progress: tqdm[Any] | None = None) -> Iterator[str]:
    """The lines of a text file (plain, .xz, .gz), stripped, without the empty ones; strict UTF-8.

    Raises InputError when the file is missing, damaged, not UTF-8 (naming the line) or has no text.
    """
    path, found, seen = Path(path), False, 0
    with _opened(path) as (raw, inside):
        for number, line in enumerate(inside, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                where = f"line {number}, byte {error.start} (0x{line[error.start]:02x})"
                raise InputError(
                    f"data file {path} is not UTF-8: {where}; convert it, for example with iconv"
                ) from error
            if progress is not None and raw.tell() != seen:
                progress.update(raw.tell() - seen)
                seen = raw.tell()
            if text:
                found = True
                yield text
    if not found:
        raise InputError(f"data file {path} is empty: give a file with text")


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file (plain, .xz, .gz), strict UTF-8. Raises InputError as read_lines does."""
    path = Path(path)
    with _opened(path) as (_, inside):
        data = inside.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} (0x{data[error.start]:02x})"
        raise InputError(f"data file {path} is not UTF-8: {where}; convert it, for example with iconv") from error
    if not text.strip():
        raise InputError(f"data file {path} is empty: give a file with text")
    return text


# --- tokens -----------------------------------------------------------------------------------------


def token_chunks(sources: Source | Iterable[Source], tokenizer: Tokenizer, eot: int) -> Iterator[np.ndarray]:
    """int32 arrays that joined are the tokens of `sources`: each non-empty stripped line, then one `eot`."""
    items = [sources] if isinstance(sources, (str, Path)) else list(sources)
    total = sum(os.path.getsize(item) for item in items if isinstance(item, Path) and item.is_file())
    with tqdm(total=total or None, desc="tokenising", unit="B", unit_scale=True, disable=None) as progress:
        batch: list[str] = []
        for item in items:
            for line in read_lines(item, progress) if isinstance(item, Path) else _lines(item):
                batch.append(line)
                if len(batch) == LINES_PER_BATCH:
                    yield _encode(batch, tokenizer, eot)
                    batch = []
        if batch:
            yield _encode(batch, tokenizer, eot)


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.split("\n") if line.strip())


def _encode(lines: list[str], tokenizer: Tokenizer, eot: int) -> np.ndarray:
    parts = [np.array([*encoding.ids, eot], np.int32) for encoding in tokenizer.encode_batch_fast(lines)]
    return np.concatenate(parts)


def encode_lines(sources: Source | Iterable[Source], tokenizer: Tokenizer, eot: int) -> np.ndarray:
    """Tokens of texts (str) or text files (Path), int32 [n]: every non-empty stripped line, one `eot` after each."""
    chunks = list(token_chunks(sources, tokenizer, eot))
    return np.concatenate(chunks) if chunks else np.empty(0, np.int32)


def token_cache(
    paths: Iterable[str | os.PathLike[str]], tokenizer: Tokenizer, eot: int, cache_dir: str | os.PathLike[str]
) -> np.memmap[Any, np.dtype[np.int32]]:
    """encode_lines() of files, kept on disk: int32 [n], read-only.

    Tokenised once per content of the files (not their names or dates), tokenizer and `eot`; written
    atomically, so a killed run leaves no short cache.
    """
    files = [Path(path) for path in paths]
    digest = hashlib.sha256(f"tokens-1 {eot} {tokenizer.to_str()}".encode())
    for path in files:
        digest.update(_content_hash(path))
    cached = Path(cache_dir) / f"tokens-{digest.hexdigest()[:32]}.bin"
    if not cached.is_file():
        with atomic_file(cached) as tmp, open(tmp, "wb") as out:
            for chunk in token_chunks(files, tokenizer, eot):
                out.write(chunk.astype("<i4").tobytes())
    return np.memmap(cached, dtype="<i4", mode="r")


def _content_hash(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror}") from error


# --- evaluation windows -----------------------------------------------------------------------------


def windows(n_tokens: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, n_scored) of each evaluation window: tokens [start, stop), its last n_scored predictions count.

    Windows of `max_length` tokens advance by `stride`; each scores its last `stride` predictions, the last
    window what is left. So the first `max_length - stride` tokens are never scored, and every later one exactly
    once (but for a window's first token, which has nothing before it, when stride equals max_length). A text
    that is no longer than what is never scored gives no window.

    >>> list(windows(11, 8, 4))
    [(0, 8, 4), (4, 11, 3)]
    """
    if max_length < 2 or not 1 <= stride <= max_length:
        raise InputError(f"stride {stride} must be from 1 to the window's length {max_length}, and that at least 2")
    start, done = 0, max_length - stride
    while done < n_tokens:
        stop = min(start + max_length, n_tokens)
        n_scored = min(stop - done, stop - start - 1)
        if n_scored:
            yield start, stop, n_scored
        start, done = start + stride, stop
