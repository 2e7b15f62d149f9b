"""The tokenizer of a model folder, as one complete `tokenizers.Tokenizer`, and how a text becomes ids.

Folders written by this project hold only tokenizer.json. A foreign folder is read by the library that defines its
files: AutoTokenizer obeys tokenizer_config.json, special_tokens_map.json, added_tokens.json, vocab.json and merges.txt.
This project then uses its backend.

One rule for all verbs: a text's ids are the ids that the tokenizer's template puts in front of a text (such as a
beginning-of-text token), then the text's own. Ids that a template appends are left out: they would end a prompt.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from training.checkpoints.files import TOKENIZER_FILES, first_line, read_json
from training.errors import InputError, install
from training.progress import note_once
from training.text.settings import SETTINGS_FILES, passed_on, unused

END_OF_TEXT = "<|endoftext|>"
READY = "tokenizer.json"
OURS = "dmpt_manifest.json"  # beside a tokenizer.json that this project made complete


def has_tokenizer(folder: Path) -> bool:
    return (folder / READY).is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The complete tokenizer of a model folder, without truncation and padding.

    Added tokens of a GPT-2 folder's tokenizer beyond the rows of its embedding are dropped, with a note: their text is
    then read as plain text. Raises InputError when there is no tokenizer or it cannot be used.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise InputError(f"{folder} has no tokenizer: put {READY} (or vocab.json and merges.txt) there")
    files = (*TOKENIZER_FILES, "config.json")
    stamps = tuple(
        (name, stat.st_mtime_ns, stat.st_size, stat.st_ino)
        for name in files
        if (folder / name).is_file() and (stat := (folder / name).stat())
    )
    return Tokenizer.from_str(_complete(folder, stamps))  # a copy: callers may change it


@lru_cache(maxsize=8)
def _complete(folder: Path, stamps: object) -> str:
    """JSON of the complete tokenizer; read once while its files keep their `stamps`."""
    if is_foreign(folder):
        tokenizer = transformers_tokenizer(folder).backend_tokenizer
        rows = row_count(folder)
        if rows is not None:
            tokenizer = without_rowless(tokenizer, rows, folder)
    else:
        tokenizer = _read(folder / READY)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text: str = tokenizer.to_str()
    return text


def is_foreign(folder: Path) -> bool:
    """Whether files besides tokenizer.json count: in a GPT-2 folder, or a folder with only a tokenizer."""
    if (folder / OURS).is_file():
        return False
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json").get("model_type") != "dmpt" or not (folder / READY).is_file()
    return any((folder / name).is_file() for name in TOKENIZER_FILES if name != READY)


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        raise InputError(f"the tokenizer in {path.parent} cannot be read ({first_line(error)}): replace it") from error


def transformers_tokenizer(folder: Path) -> Any:
    """The tokenizer that Transformers builds from a folder's files.

    The files are first copied beside our own config.json: nothing of the folder's config reaches the library, and of
    its settings only those that training.text.settings lists.
    """
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            check_form(folder / name)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if settings.get("auto_map"):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: auto_map: the tokenizer contains custom code, which is not run"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(f"reading the tokenizer of {folder} needs transformers: {install('train')}") from error
    with tempfile.TemporaryDirectory() as place:
        copy_files(folder, Path(place))
        try:
            if not (folder / READY).is_file():  # Transformers 4 ignores merges of unknown tokens
                models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            read = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # libraries raise what they like for damaged files
            reason = first_line(error).replace(place, str(folder))
            raise InputError(f"the tokenizer in {folder} cannot be read ({reason}): {advice(settings)}") from error
    if not getattr(read, "is_fast", False):
        raise InputError(f"the tokenizer in {folder} ({type(read).__name__}) has no fast form: GPT-2's is needed")
    return read


def copy_files(folder: Path, place: Path) -> None:
    """A folder's tokenizer for Transformers to read: its files, and what is passed on of its settings."""
    for name in TOKENIZER_FILES:
        if name in SETTINGS_FILES and (folder / name).is_file():
            settings = read_json(folder / name)
            if names := unused(settings):
                note_once(f"{folder / name}: not used: {', '.join(names)}")
            (place / name).write_text(json.dumps(passed_on(settings)), encoding="utf-8")
        elif (folder / name).is_file():
            shutil.copyfile(folder / name, place / name)
    (place / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")


def check_form(path: Path) -> None:
    """Raise InputError for a JSON file that is not what its name says: words and ids of it are copied."""
    fields = read_json(path)
    if path.name in ("vocab.json", "added_tokens.json"):
        wrong = [key for key, value in fields.items() if type(value) is not int]
    elif path.name == "special_tokens_map.json":
        wrong = [key for key in fields if not key.endswith(("_token", "_tokens"))]
    else:
        wrong = []
    if wrong:
        raise InputError(f"{path} does not hold tokens, first at {wrong[0][:40]!r}: restore or replace it")


def advice(settings: Mapping[str, Any]) -> str:
    """Advice for tokenizer files that the installed Transformers cannot read; settings: tokenizer_config.json."""
    installed = version("transformers")
    if "backend" in settings and int(installed.partition(".")[0]) < 5:  # a field that Transformers 5 introduced
        return f"Transformers 5 wrote it and {installed} is installed: pip install 'transformers>=5'"
    return "replace it"


def without_rowless(tokenizer: Tokenizer, rows: int, folder: Path) -> Tokenizer:
    """The tokenizer without added tokens beyond the `rows` of the embedding (DialoGPT has one such token).

    Raises InputError if its base vocabulary or its template exceeds them.
    """
    highest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if highest >= rows:
        raise InputError(
            f"the tokenizer in {folder} has ids up to {highest}, its model {rows} tokens: "
            "they do not belong together; put the model's own tokenizer beside it"
        )
    data = json.loads(tokenizer.to_str())
    dropped = [token for token in data["added_tokens"] if token["id"] >= rows]
    if not dropped:
        return tokenizer
    if max(prefix_ids(tokenizer), default=0) >= rows:
        raise InputError(f"the tokenizer in {folder} puts a token in front of texts that its model of {rows} lacks")
    names = ", ".join(f"{token['content']} ({token['id']})" for token in dropped)
    note_once(f"{folder}: the embedding has {rows} rows, none for {names}: text like it is read as plain text")
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < rows]
    return Tokenizer.from_str(json.dumps(data))


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that the tokenizer's template puts in front of every text."""
    own = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    starts = [i for i in range(len(whole)) if whole[i : i + len(own)] == own]
    return list(whole[: starts[0]]) if starts else []


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of one text, by the rule above."""
    return [*prefix_ids(tokenizer), *tokenizer.encode(text, add_special_tokens=False).ids]


def end_of_text(tokenizer: Tokenizer, folder: Path) -> int | None:
    """The id of the tokenizer's end of text: `eos_token` of its files, else `<|endoftext|>`; None without either."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        eos: Any = read_json(path).get("eos_token") if path.is_file() else None
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if isinstance(eos, str) and (known := tokenizer.token_to_id(eos)) is not None:
            return int(known)
    found = tokenizer.token_to_id(END_OF_TEXT)
    return None if found is None else int(found)


def save_tokenizer(source: Path, target: Path, end: int | None) -> bool:
    """Write the complete tokenizer of a folder into another; returns False when it has none.

    tokenizer_config.json beside it makes Transformers read the same tokenizer, with `end` as the end-of-text id.
    """
    if not has_tokenizer(source):
        return False
    tokenizer = load_tokenizer(source)
    tokenizer.save(str(target / READY))
    name = None if end is None else tokenizer.id_to_token(end)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # its default has token_type_ids, which generate refuses
        "clean_up_tokenization_spaces": False,
    }
    before = json.loads(tokenizer.to_str()).get("pre_tokenizer") or {}
    if "add_prefix_space" in before:
        settings["add_prefix_space"] = before["add_prefix_space"]
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": name}) + "\n", encoding="utf-8")
    return True


def row_count(folder: Path) -> int | None:
    """Rows of the embedding of a GPT-2 folder; None where there is no config."""
    if not (folder / "config.json").is_file():
        return None
    size = read_json(folder / "config.json").get("vocab_size", 50257)
    return size if type(size) is int else None
