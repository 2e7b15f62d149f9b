"""A model folder as far as it can be known without torch: config.json, which tensors there are, and their shapes.

Reading the tensors is training.checkpoint's. What is wrong here is said before the seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import InputError
from training.files import read_json, resolve
from training.gpt2 import dmpt_name, gpt2_fields
from training.shape import Shape

Source = str | os.PathLike[str]  # a DMPT or GPT-2 folder, or a hub id
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "gate_hidden")
LARGEST = 1 << 24  # of any size; the product of two still counts elements without overflow
TOKENS = ("bos_token_id", "eos_token_id")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER = 100_000_000  # bytes; what the safetensors library takes


# --- config.json --------------------------------------------------------------------------------------


def read_fields(source: Source) -> tuple[Path, dict[str, Any]]:
    """(config.json, the fields of a DMPT from it) of a DMPT, quantized or GPT-2 folder, or a hub id.

    Plain GPT-2 becomes `splits=[]` with one head. Raises InputError naming the folder and the field.
    """
    folder = resolve(source)
    if not (folder / "config.json").is_file():
        known = "an exported model (run it with `dmpt-export run`)" if (folder / "dmpt_manifest.json").is_file() else ""
        raise InputError(f"{folder} is {known or 'no model folder: it has no config.json'}")
    path = folder / "config.json"
    fields = read_json(path)
    kind = fields.get("model_type")
    if kind not in ("dmpt", "gpt2"):
        raise InputError(f"{path}: model_type {kind!r} is not supported, only 'dmpt' and 'gpt2' are")
    check_fields(fields, path)
    if fields.get("quantization") is None:
        fields.pop("quantization", None)  # null says what leaving it out says
    with naming(path):
        return path, gpt2_fields(fields) if kind == "gpt2" else fields


def read_shape(source: Source) -> Shape:
    """What the model in a folder (or a hub id) is. Raises InputError as read_fields, and for contradictions."""
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
    """Turn what making a configuration of a config.json raises into InputErrors that name the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path} cannot be used ({error}): restore or replace it") from error


def check_fields(fields: Mapping[str, Any], path: Path) -> None:
    """Raise InputError naming the first field of a config.json whose value is of the wrong kind.

    Python's JSON reads NaN and Infinity, and true passes for 1.
    """

    def whole(value: Any, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    def positive(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < float("inf")

    vocab_size: Any = fields.get("vocab_size")
    last = vocab_size - 1 if whole(vocab_size, 1, LARGEST) and fields["model_type"] == "dmpt" else LARGEST
    kinds = (
        (SIZES, f"a whole number from 1 to {LARGEST}", lambda value: whole(value, 1, LARGEST)),
        (("gate_temp", "head_gate_temp", "layer_norm_epsilon"), "a number above 0", positive),
        (("fast_k", "head_topk"), "a whole number or null", lambda value: value is None or type(value) is int),
        (("splits",), "a list of whole numbers", lambda value: type(value) is list and {*map(type, value)} <= {int}),
        (("tie_word_embeddings",), "true or false", lambda value: type(value) is bool),
        (TOKENS, f"a token id from 0 to {last} or null", lambda value: value is None or whole(value, 0, last)),
    )
    for names, kind, fits in kinds:
        for name in names:
            if name in fields and not fits(fields[name]) and not (name == "n_inner" and fields[name] is None):
                raise InputError(f"{path}: {name} must be {kind}, not {fields[name]!r}")


def read_head_allocation(path: Source) -> dict[str, list[int]]:
    """Which head ids belong to which leaf, from JSON such as {"left": [0, 1], "right": [2, 3]}.

    Raises InputError when the file is no such object; whether it fits the tree is Shape's check.
    """
    allocation = read_json(Path(path))
    for leaf, heads in allocation.items():
        if not isinstance(heads, list) or any(type(j) is not int for j in heads):
            raise InputError(f"{path}: the heads of '{leaf}' must be a list of whole numbers, not {json.dumps(heads)}")
    return allocation


# --- tensors ------------------------------------------------------------------------------------------


def tensor_files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    """The safetensors files of a folder, each with the names to take from it (None: all)."""
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

    {} where a header cannot be read: what is wrong with the file is told by who reads the tensors. Raises InputError
    as tensor_files. Source: github.com/huggingface/safetensors, "Format".
    """
    gpt2 = read_json(folder / "config.json").get("model_type") == "gpt2"
    out: dict[str, tuple[int, ...]] = {}
    for path, wanted in tensor_files(folder):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length)) if length <= MOST_HEADER else {}
            for name in sorted(entries.keys() - {"__metadata__"} if wanted is None else wanted):
                new = dmpt_name(name, tied=shape.tie_word_embeddings) if gpt2 else name
                if new is not None:
                    out[new] = tuple(entries[name]["shape"])
        except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
            return {}
    return out
