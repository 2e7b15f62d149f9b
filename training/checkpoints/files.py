"""Find a model's folder and read its JSON files. Standard library only; the hub client is imported for hub ids."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.checkpoints.links import check_links
from training.errors import InputError, install
from training.progress import note_once

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
EXPECTED = "give a .pt file that the original project's training wrote"
# The files that a model folder needs; hubs also hold TensorFlow, ONNX and pickled copies.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def resolve(
    source: str | os.PathLike[str], files: Sequence[str] = (*MODEL_FILES, *TOKENIZER_FILES, "README.md")
) -> Path:
    """The local folder of a model: `source` itself, or the folder with the `files` of its hub snapshot.

    A folder wins over a hub id of the same name. Raises InputError when there is neither, and for a folder that links
    to files elsewhere (training.checkpoints.links).
    """
    path = Path(source)
    check_name(path)
    if path.is_dir():
        check_links(path)
        return path
    if path.is_symlink():
        raise InputError(f"{path} is a broken or circular link: give the model folder itself")
    if path.exists():
        hint = ": convert it first with `dmpt-export convert`" if path.suffix in (".pt", ".pth") else ""
        raise InputError(f"{path} is a file, a model is a folder{hint or ': give the folder that holds config.json'}")
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise InputError(f"model folder {path} does not exist: check the path")
    return _hub_snapshot(source, files)


def _hub_snapshot(name: str, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise InputError(
            f"there is no folder '{name}', and reading it from the hub needs huggingface_hub: {install('train')}"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"there is no folder '{name}', and the Hugging Face hub cannot be reached to look for a model of that "
            "name: check the path, or the network when you meant a hub id"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"there is no folder '{name}', and the Hugging Face hub does not provide a model of that name "
            f"({first_line(error)}): check the spelling, and your login for a private one"
        ) from error


def cache_folder() -> Path:
    """The folder for data that can be recomputed; without a home directory, a temporary folder."""
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place) / "dmpt-export"
    try:
        return Path.home() / ".cache" / "dmpt-export"
    except RuntimeError:  # no HOME, and no entry for this user id
        place = str(Path(tempfile.gettempdir()) / f"dmpt-export-{os.getuid() if hasattr(os, 'getuid') else 0}")
        note_once(f"there is no home directory: caches go to {place} (--cache-dir or XDG_CACHE_HOME choose another)")
        return Path(place)


def check_readable(path: Path) -> None:
    """Raise the system's own OSError for a file that cannot be opened: the safetensors library reports every such file
    as missing."""
    with open(path, "rb"):
        pass


def check_name(path: Path) -> None:
    """Raise InputError for a path whose name is not UTF-8: libraries that read and write models refuse it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        shown = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise InputError(f"the name {shown} is not UTF-8, which models need: rename it") from None


def check_pt(path: Path) -> None:
    """Raise InputError for a file that cannot be an original .pt checkpoint: missing, or not an archive."""
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file: {EXPECTED}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a PyTorch checkpoint, or cut short: copy it again")


def first_line(error: BaseException) -> str:
    """The message of another library's error, short enough for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is missing, damaged or not an object."""
    try:
        value = parsed(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({first_line(error)}): restore or replace it") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return copy.deepcopy(value)


@lru_cache(maxsize=8)
def parsed(data: bytes) -> Any:
    """JSON in UTF-8, parsed once for all readers of a file: not to be changed. Raises ValueError, RecursionError."""
    return json.loads(data.decode("utf-8"))
