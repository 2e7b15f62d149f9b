"""What can be read from a model folder without torch: config.json, tensor names and shapes.

training.checkpoints.checkpoint reads the tensors themselves. Faults found here are reported before torch is imported,
which takes seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.checkpoints.files import read_json, resolve
from training.errors import InputError
from training.model.domains import Served, is_served
from training.model.fields import check_fields, check_known, own_fields, without_aliases
from training.model.gpt2 import HEAD, Names, gpt2_fields
from training.model.shape import EMBEDDING, Shape
from training.progress import note_once
from training.text.ends import end_ids

Source = str | os.PathLike[str]  # a DMPT or GPT-2 folder, or a hub id
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER = 100_000_000  # bytes; the safetensors library's limit
CHUNK = 1 << 24  # bytes compared at a time


# Whether GPT-2 folders are compared with Transformers when their tensors are first read
# (training.checkpoints.verify_gpt2).
VERIFY: ContextVar[bool] = ContextVar("verify_gpt2", default=True)


@contextmanager
def unverified() -> Iterator[None]:
    """Skip that comparison for GPT-2 folders read inside the block: --no-verify."""
    token = VERIFY.set(False)
    try:
        yield
    finally:
        VERIFY.reset(token)


# --- config.json --------------------------------------------------------------------------------------


def read_fields(source: Source) -> tuple[Path, dict[str, Any]]:
    """(config.json, the fields of a DMPT from it) of a DMPT, quantized or GPT-2 folder, or a hub id.

    Plain GPT-2 becomes `splits=[]` with one head. `eos_token_id` has the ids that end a text (training.text.ends).
    Raises InputError naming the folder and the field.
    """
    folder = resolve(source)
    if (folder / "dmpt_manifest.json").is_file():
        use = "open it with optimum or another program that its README.md names"
        raise InputError(
            f"{folder} is an exported model, not a checkpoint: "
            + (use if (folder / "config.json").is_file() else "run it with `dmpt-export run`")
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    path = folder / "config.json"
    fields = read_json(path)
    kind = fields.get("model_type")
    if kind not in ("dmpt", "gpt2"):
        raise InputError(f"{path}: model_type {kind!r} is not supported, only 'dmpt' and 'gpt2' are")
    with naming(path):
        if kind == "gpt2":
            fields = without_aliases(fields)
        check_fields(fields, own=kind == "dmpt")
        if fields.get("quantization") is None:
            fields.pop("quantization", None)  # null means the same as leaving it out
        if kind == "dmpt":
            fields, unused = own_fields(fields)
        else:
            unused, fields = check_known(fields), gpt2_fields(fields)
        if unused:
            note_once(f"{path}: not used: {', '.join(unused)}")
        if kind == "gpt2" and fields.get("tie_word_embeddings", True) and has_other_head(folder):
            note_once(f"{folder}: its lm_head.weight differs from the embedding, which config.json ties it to: "
                      "the file's own head is used, untied")  # fmt: skip
            fields["tie_word_embeddings"] = False
        ends = end_ids(folder, fields)
        fields["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return path, fields


def read_shape(source: Source) -> Shape:
    """The Shape of the model in a folder or hub id. Raises InputError as read_fields, and for contradictions."""
    path, fields = read_fields(source)
    with naming(path):
        return Shape.of(fields)


def float_folder(source: Source) -> Path:
    """The folder of a float checkpoint. Raises InputError as read_shape and tensor_files, and for a quantized one."""
    path, fields = read_fields(source)
    with naming(path):
        Shape.of(fields)
    if "quantization" in fields:
        raise InputError(
            f"{path.parent} is already quantized, float weights are needed here: give the checkpoint it was made from, "
            "or read it with quant.checkpoint.dequantized_model"
        )
    tensor_files(path.parent)
    return path.parent


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of building a configuration from config.json into InputErrors that name the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path} cannot be used ({error}): restore or replace it") from error


def read_head_allocation(path: Source) -> dict[str, list[int]]:
    """The head ids of each leaf, from JSON such as {"left": [0, 1], "right": [2, 3]}.

    Raises InputError for any other form of file; Shape checks whether it fits the tree.
    """
    allocation = read_json(Path(path))
    for leaf, heads in allocation.items():
        if not isinstance(heads, list) or any(type(j) is not int for j in heads):
            raise InputError(f"{path}: the heads of '{leaf}' must be a list of whole numbers, not {json.dumps(heads)}")
    return allocation


def read_domain_map(path: Source) -> dict[str, Served]:
    """What serves each domain, from JSON such as {"code": "left", "prose": [4, 5]}.

    Raises InputError for any other form of file; Shape checks whether the model has such paths and heads.
    """
    domains = read_json(Path(path))
    for name, served in domains.items():
        if not is_served(served):
            form = "the name of a path or a list of heads"
            raise InputError(f"{path}: what serves '{name}' must be {form}, not {json.dumps(served)}")
    return domains


# --- tensors ------------------------------------------------------------------------------------------


def tensor_files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    """The safetensors files of a folder, each with the names to read from it (None: all)."""
    if (folder / SINGLE).is_file():
        return [(folder / SINGLE, None)]
    index = folder / INDEX
    if not index.is_file():
        if list(folder.glob("pytorch_model*.bin")):
            raise InputError(
                f"{folder} has only pickled weights (pytorch_model.bin), which are not read because they can run code: "
                "convert it once with transformers, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
            )
        raise InputError(f"{folder} has no {SINGLE}: give a folder with a trained model")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: fetch the model again")
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise InputError(f"{index} points outside its folder for '{name}' ({file!r}): do not use this model")
        by_file.setdefault(file, []).append(name)
    for file in by_file:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing, though {INDEX} names it: fetch the model again")
    return [(folder / file, names) for file, names in sorted(by_file.items())]


def tensor_shapes(folder: Path, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of a float checkpoint's tensors by the contract's names, from the headers of its files.

    {} where a header cannot be read: the fault is reported when the tensors are read. Raises InputError as
    tensor_files.
    """
    found = headers(folder)
    if read_json(folder / "config.json").get("model_type") != "gpt2":
        return {name: entry.shape for name, entry in found.items()}
    names = Names.of(found)
    out = {new: entry.shape for name, entry in found.items() if (new := names.contract(name)) is not None}
    if shape.tie_word_embeddings:
        out.pop(HEAD, None)
    return out


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int  # offset of its bytes in the file
    size: int


def headers(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder by their files' names, from the headers; {} where one cannot be read.

    Raises InputError as tensor_files. Source: github.com/huggingface/safetensors, "Format".
    """
    out: dict[str, Entry] = {}
    for path, wanted in tensor_files(folder):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length)) if length <= MOST_HEADER else {}
            for name in sorted(entries.keys() - {"__metadata__"} if wanted is None else wanted):
                first, last = entries[name]["data_offsets"]
                out[name] = Entry(
                    path, tuple(entries[name]["shape"]), entries[name]["dtype"], 8 + length + first, last - first
                )
        except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
            return {}
    return out


def has_other_head(folder: Path) -> bool:
    """Whether a GPT-2's files hold an lm_head.weight that differs from the embedding."""
    found = headers(folder)
    names = Names.of(found)
    head, embedding = (found.get(names.file(name)) for name in (HEAD, EMBEDDING))
    if head is None or embedding is None or head.shape != embedding.shape:
        return False  # shapes are checked when the tensors are read
    stamps = tuple((entry.file.stat().st_mtime_ns, entry.file.stat().st_size) for entry in (head, embedding))
    return head.dtype != embedding.dtype or _differ(head, embedding, stamps)


@lru_cache(maxsize=8)
def _differ(a: Entry, b: Entry, stamps: object) -> bool:
    """Whether two tensors' bytes differ; read once while their files keep their `stamps`."""
    with open(a.file, "rb") as left, open(b.file, "rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        for done in range(0, a.size, CHUNK):
            size = min(CHUNK, a.size - done)
            if left.read(size) != right.read(size):
                return True
    return False
