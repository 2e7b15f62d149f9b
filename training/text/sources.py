"""Text sources: files of several kinds and datasets of the Hugging Face hub, all read as lines.

    text.txt  text.txt.xz  .gz  .zst      plain text (any name that is not one of the following)
    text.jsonl  .ndjson  .json            one JSON object per line; its field `text`; also .xz, .gz, .zst
    text.parquet                          its column `text`
    wikitext-103   OWNER/NAME:CONFIG:SPLIT    a hub dataset's column `text`; a file of that name wins

A record of several lines counts as its lines, so that the same text gives the same tokens in every kind of file.
Standard library only; zstandard, pyarrow and datasets are imported when a source needs them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from training.checkpoints.files import first_line
from training.errors import FieldError, InputError, install
from training.text.zstd import DamagedError, ZstdReader

if TYPE_CHECKING:
    from tqdm import tqdm

FIELD = "text"  # of a JSON object, a Parquet file or a dataset
ROWS_AT_ONCE = 1000  # rows of Parquet files and datasets in memory
INSTALL = install("data")

# suffix -> opener of the unpacked bytes; no entry: the file itself
OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".xz": lzma.open,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".zst": ZstdReader,
}
JSONL, PARQUET = (".jsonl", ".ndjson", ".json"), ".parquet"
FILE_SUFFIXES = {*OPENERS, *JSONL, PARQUET, ".txt", ".raw", ".md", ".tokens", ".csv"}  # never a dataset's name
LIBRARY = {".zst": "zstandard", PARQUET: "pyarrow"}

# short name -> (hub id, configuration)
DATASETS = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
DATASET = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:((?P<config>[\w.-]+):)?(?P<split>\w[\w.-]*(\[[^]]*\])?))?"
)


def is_dataset(source: str | os.PathLike[str]) -> bool:
    """Whether `source` names a hub dataset: not an existing file, NAME[[:CONFIG]:SPLIT] in form, no file suffix."""
    path = Path(source)
    found = DATASET.fullmatch(str(path))
    return found is not None and not path.exists() and Path(found["name"]).suffix.lower() not in FILE_SUFFIXES


def check_source(source: str | os.PathLike[str]) -> None:
    """Raise InputError, before long work, when the file is missing or empty or its library is not installed."""
    path = Path(source)
    if is_dataset(path):
        if find_spec("datasets") is None:
            raise InputError(
                f"there is no file '{path}', and reading a dataset of the Hugging Face hub needs datasets: {INSTALL}"
            )
        return
    if not path.exists():
        raise InputError(f"data file {path} does not exist: check the path")
    if path.is_dir():
        raise InputError(f"data file {path} is a folder: give a file in it")
    library = LIBRARY.get(path.suffix.lower())
    if library is not None and find_spec(library) is None:
        raise InputError(f"reading {path} needs {library}: {INSTALL}")
    if path.is_file() and not path.stat().st_size:  # the size of a pipe means nothing
        raise InputError(f"data file {path} is empty: give a file with text")


def read_lines(path: str | os.PathLike[str], progress: tqdm[Any] | None = None, field: str = FIELD) -> Iterator[str]:
    """The non-empty lines of a source, stripped; strict UTF-8.

    Raises InputError, naming the line or row if known, when the source is missing, damaged, not UTF-8, lacks `field`
    or has no text, and when the library that reads it is not installed.
    """
    path, found = Path(path), False
    for text in _texts(path, progress, field):
        for line in text.split("\n"):
            if line := line.strip():
                found = True
                yield line
    if not found:
        raise InputError(f"data file {path} is empty: give a file with text")


def read_text(path: str | os.PathLike[str], field: str = FIELD) -> str:
    """The whole text of a source: a plain file unchanged, else one record per line. Raises InputError as read_lines."""
    path = Path(path)
    separator = "" if kind_of(path) == "text" else "\n"
    text = separator.join(_texts(path, None, field))
    if not text.strip():
        raise InputError(f"data file {path} is empty: give a file with text")
    return text


def read_rows(path: str | os.PathLike[str], field: str = FIELD) -> Iterator[str]:
    """The rows of a source in the form of the hub's WikiText datasets: a plain file's lines with their newlines, else
    the unchanged records; "" for rows of only white space. Raises InputError as read_lines."""
    path, found = Path(path), False
    for text in _texts(path, None, field):
        blank = not text.strip()
        found |= not blank
        yield "" if blank else text
    if not found:
        raise InputError(f"data file {path} is empty: give a file with text")


def content_hash(path: str | os.PathLike[str], field: str = FIELD) -> bytes:
    """Hash of what determines a source's tokens besides the tokenizer: its content and kind, not its name or date."""
    path = Path(path)
    check_source(path)
    kind = kind_of(path)
    digest = hashlib.sha256(f"{kind} {'' if kind == 'text' else field}\n".encode())
    if kind == "dataset":
        for text in _texts(path, None, field):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()
    try:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror}") from error
    return digest.digest()


def kind_of(path: Path) -> str:
    """text, jsonl, parquet or dataset: how the (unpacked) bytes become texts."""
    if is_dataset(path):
        return "dataset"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "jsonl" if last in JSONL else "parquet" if last == PARQUET else "text"


def _texts(path: Path, progress: tqdm[Any] | None, field: str) -> Iterator[str]:
    """The texts of a source: lines of a plain file, records of the other kinds."""
    check_source(path)
    kind = kind_of(path)
    if kind == "text":
        return (line for _, line in _decoded(path, progress))
    return {"jsonl": _json_texts, "parquet": _parquet_texts, "dataset": _dataset_texts}[kind](path, progress, field)


# --- files of lines ---------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The raw file (for progress) and its unpacked bytes. Turns read errors into InputError."""
    try:
        with open(path, "rb") as raw:
            opener = OPENERS.get(path.suffix.lower())
            yield raw, (io.BufferedReader(opener(raw), 1 << 20) if opener else raw)
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, DamagedError, EOFError) as error:
        raise InputError(f"data file {path} is damaged ({first_line(error)}): unpack or fetch it again") from error
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror or first_line(error)}") from error


def _decoded(path: Path, progress: tqdm[Any] | None) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its newline) of a UTF-8 file."""
    seen = 0
    with _opened(path) as (raw, inside):
        for number, line in enumerate(inside, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"line {number}, byte {error.start} (0x{line[error.start]:02x})"
                raise InputError(
                    f"data file {path} is not UTF-8: {where}; convert it, for example with iconv"
                ) from error
            if progress is not None and raw.tell() != seen:
                progress.update(raw.tell() - seen)
                seen = raw.tell()
            yield number, text


def _json_texts(path: Path, progress: tqdm[Any] | None, field: str) -> Iterator[str]:
    """The field of each JSON object, one object per line."""
    example = f'write one object per line, as {{"{field}": "..."}}'
    for number, line in _decoded(path, progress):
        if not line.strip():
            continue
        where = f"data file {path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
            raise InputError(
                f'{where} is not JSON ({reason}): write one object per line, as {{"{field}": "..."}}'
            ) from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise InputError(f"{where} is not a JSON object but a {kind}: {example}")
        if field not in record:
            raise _lacking(f"{where} has no field '{field}'", record)
        yield from _checked([record[field]], field, f"data file {path}, line", number)


# --- tables -----------------------------------------------------------------------------------------


def _parquet_texts(path: Path, progress: tqdm[Any] | None, field: str) -> Iterator[str]:
    """A column of a Parquet file, read in pieces."""
    import pyarrow
    from pyarrow import parquet

    if path.suffix.lower() in OPENERS:
        raise InputError(f"data file {path} is a packed Parquet file, but Parquet is itself packed: unpack it first")
    try:
        with open(path, "rb") as raw, parquet.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise _lacking(f"data file {path} has no column '{field}'", names)
            rows, share = 0, path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[field]):
                yield from _checked(batch.column(0).to_pylist(), field, f"data file {path}, row", rows + 1)
                rows += len(batch)
                if progress is not None:
                    progress.update(round(share * rows) - round(share * (rows - len(batch))))
    except UnicodeDecodeError as error:
        raise InputError(f"data file {path} is not UTF-8 in column '{field}': convert it") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data file {path} is damaged or not Parquet ({first_line(error)}): fetch it again") from error


def _dataset_texts(path: Path, progress: tqdm[Any] | None, field: str) -> Iterator[str]:
    """A column of a hub dataset, downloaded once and then read from disk."""
    dataset = _load_dataset(path)
    if field not in dataset.column_names:
        raise _lacking(f"dataset {path} has no column '{field}'", dataset.column_names)
    rows = 0
    for batch in dataset.select_columns([field]).iter(batch_size=ROWS_AT_ONCE):
        yield from _checked(batch[field], field, f"dataset {path}, row", rows + 1)
        rows += len(batch[field])
        if progress is not None:
            progress.update(sum(len(text or "") for text in batch[field]))


def _load_dataset(path: Path) -> Any:
    """One split of a hub dataset. Raises InputError naming the cause: name, configuration, split or network."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    parts = DATASET.fullmatch(str(path))
    assert parts is not None
    name, config = DATASETS.get(parts["name"], (parts["name"], None))
    retries = logging.getLogger("huggingface_hub")
    level = retries.level
    try:
        retries.setLevel(logging.ERROR)  # each of five attempts to reach the hub logs a paragraph
        return datasets.load_dataset(name, parts["config"] or config, split=parts["split"] or "train")
    except ConnectionError as error:
        raise InputError(
            f"there is no file '{path}', and the Hugging Face hub cannot be reached to look for a dataset {name}: "
            "check the path, or the network when you meant a dataset"
        ) from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"there is no file '{path}', and the Hugging Face hub does not provide the dataset {name} "
            f"({first_line(error)}): check the path, or write NAME:CONFIG:SPLIT"
        ) from error
    finally:
        retries.setLevel(level)


def _checked(values: Iterable[Any], field: str, where: str, first: int) -> Iterator[str]:
    """The texts in `values`, without nulls. Errors name a value by `where` and its number, counted from `first`."""
    for number, value in enumerate(values, start=first):
        if value is None:
            continue
        if not isinstance(value, str):
            kind = type(value).__name__
            raise FieldError(
                "{} {}: '{}' is {}, not text: choose another with {text_field}", where, number, field, kind
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} {number}: '{field}' holds half a surrogate pair, which is not text") from error
        yield value


def _lacking(what: str, names: Iterable[str]) -> InputError:
    """What says that something lacks the field or column where text should be, and which it has instead."""
    listed = ", ".join(names)
    if not listed:
        return InputError(f"{what}: it has none")
    return FieldError("{}: choose one of {} with {text_field}", what, listed)
