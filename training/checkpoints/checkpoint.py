"""Checkpoint folders: reading a DMPT or GPT-2, writing a DMPT. The public entry point to everything on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.checkpoints.atomic import atomic_folder
from training.checkpoints.card import CARD, card_text, inherited, model_fields, tags_of, title
from training.checkpoints.files import TOKENIZER_FILES, read_json, resolve
from training.checkpoints.folder import SINGLE, Source, float_folder, headers, naming, read_fields
from training.checkpoints.tensors import read_tensors, write_tensors
from training.checkpoints.verify_gpt2 import verify_source
from training.errors import InputError
from training.model.config import DMPTConfig
from training.model.fields import DMPT, TOKENS, tokens
from training.model.generation import DMPTForCausalLM
from training.model.gpt2 import Names
from training.text.tokenizer import has_tokenizer, load_tokenizer, save_tokenizer
from training.text.windows import check_vocabulary

TIED_HEAD = "heads.0.weight"
MOST_NAMED = 40  # tensor names in one error line


@dataclass
class Checkpoint:
    """A float checkpoint in memory."""

    config: DMPTConfig
    tensors: dict[str, Tensor]  # float32, by the contract's names; a tied heads.0 is absent
    folder: Path  # where it was read from; also holds the tokenizer


# --- reading ----------------------------------------------------------------------------------------


def read_config(source: Source) -> DMPTConfig:
    """The configuration of a DMPT folder, a quantized folder, a GPT-2 folder or a hub id.

    Plain GPT-2 becomes `splits=[]` with one head. Raises InputError naming the folder and the field.
    """
    path, fields = read_fields(source)
    with naming(path):
        return DMPTConfig.from_dict(fields)


def read_checkpoint(source: Source) -> Checkpoint:
    """Configuration and checked float32 tensors of a DMPT or GPT-2 folder, or a hub id.

    Raises InputError for a missing or quantized folder, damaged files, and missing, unexpected or misshapen tensors
    (all named at once).
    """
    folder = float_folder(source)
    config = read_config(folder)
    tied = config.tie_word_embeddings
    if read_json(folder / "config.json")["model_type"] == "gpt2":
        names = Names.of(headers(folder))

        def rename(name: str) -> str | None:
            new = names.contract(name)
            return None if tied and new == TIED_HEAD else new  # equal to the embedding: see read_fields

        tensors = read_tensors(folder, rename)
        check_tensors(config, shapes_of(tensors), folder, names.file)
        verify_source(folder, lambda: model_from_tensors(config, tensors), tensors, names)
    else:
        tensors = read_tensors(folder)
        check_tensors(config, shapes_of(tensors), folder)
    return Checkpoint(config, tensors, folder)


def load_state(source: Source) -> tuple[DMPTConfig, dict[str, np.ndarray]]:
    """Configuration and float32 arrays by the contract's tensor names; a tied heads.0 is absent."""
    checkpoint = read_checkpoint(source)
    return checkpoint.config, {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}


def load_model(source: Source) -> DMPTForCausalLM:
    """The float32 model of a DMPT or GPT-2 folder, or a hub id, in eval mode. Raises as read_checkpoint."""
    checkpoint = read_checkpoint(source)
    return model_from_tensors(checkpoint.config, checkpoint.tensors)


def model_from_tensors(config: DMPTConfig, tensors: Mapping[str, Tensor]) -> DMPTForCausalLM:
    """A model with the given tensors (not copied), in eval mode. Raises InputError when they do not fit `config`."""
    check_tensors(config, shapes_of(tensors), "the model")
    model = empty_model(config)
    given = dict(tensors)
    if config.tie_word_embeddings:
        given[TIED_HEAD] = given["transformer.wte.weight"]
    model.load_state_dict(given, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected_shapes(config: DMPTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint of `config`, in the model's order."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(TIED_HEAD)
    return shapes


def empty_model(config: DMPTConfig) -> DMPTForCausalLM:
    """A model whose tensors have shapes but no memory, so that any sizes in `config` are safe."""
    with torch.device("meta"):
        return DMPTForCausalLM(config)


def check_tensors(
    config: DMPTConfig,
    shapes: Mapping[str, tuple[int, ...]],
    where: object,
    filed: Callable[[str], str] = str,
) -> None:
    """Raise InputError naming every missing, unexpected and misshapen tensor. `where` names the source; `filed` maps a
    tensor's name to its name in the file."""
    if config.n_layer > len(shapes):
        raise InputError(f"{where}: config says {config.n_layer} blocks, but there are only {len(shapes)} tensors")
    expected = expected_shapes(config)
    extra = set(shapes) - set(expected) - ({TIED_HEAD} if config.tie_word_embeddings else set())
    wrong = [
        f"{filed(name)} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    parts = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing", [filed(name) for name in expected if name not in shapes]),
            ("unexpected", sorted(map(filed, extra))),
            ("wrong shape", wrong),
        )
        if names
    ]
    if parts:
        raise InputError(f"the tensors of {where} do not fit its config.json; {'; '.join(parts)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


# --- writing ----------------------------------------------------------------------------------------


def save_model(
    model: DMPTForCausalLM,
    out: Source,
    tokenizer_from: Source | None = None,
    card: str | None = None,
    source: Source | None = None,
) -> None:
    """Write a checkpoint folder atomically: config, weights, tokenizer, generation config, model card.

    `card`: Markdown for README.md about the model's origin. `source`: the model that it was made from, for the license
    and the like on its card. Raises InputError when `out` holds anything but a
    checkpoint of ours.
    """
    with atomic_folder(out, "checkpoint") as tmp:
        write_model(model, tmp, tokenizer_from, card, Path(out).resolve().name, source)


def write_model(
    model: DMPTForCausalLM,
    folder: Path,
    tokenizer_from: Source | None = None,
    card: str | None = None,
    name: str = "DMPT",
    source: Source | None = None,
) -> None:
    """Write the files of save_model into an existing folder (from atomic_folder), which may get more files."""
    config = model.config
    assert isinstance(config, DMPTConfig)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        if model.heads[0].weight is not model.transformer.wte.weight:
            raise ValueError("config ties heads.0 to transformer.wte, but the model holds two tensors: tie_weights()")
        tensors.pop(TIED_HEAD)
    write_tensors(folder / SINGLE, tensors)
    write_json(folder / "config.json", config_fields(config))
    ids = {key: getattr(config, key) for key in TOKENS}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, folder, config)
    (folder / CARD).write_text(model_card(config, name, card, source), encoding="utf-8")


def config_fields(config: DMPTConfig) -> dict[str, Any]:
    """config.json of a float checkpoint: the fields that differ from transformers' defaults, and all of ours."""
    fields = config.to_diff_dict()
    fields |= {name: getattr(config, name) for name in (*DMPT, "head_allocation")}
    fields |= {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    fields |= {"architectures": ["DMPTForCausalLM"], "tie_word_embeddings": config.tie_word_embeddings}
    fields.pop("quantization", None)
    return fields


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, indented, in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(src: Source, dst: Source, config: Any = None) -> bool:
    """Write the complete tokenizer of a model folder or hub id into `dst`; returns False when it has none.

    config: of the model that will use it. Raises InputError when the tokenizer cannot be read, or has ids beyond
    config's vocab_size.
    """
    source = resolve(src, TOKENIZER_FILES)
    if config is not None and has_tokenizer(source):
        check_vocabulary(load_tokenizer(source), config.vocab_size, source)
    return save_tokenizer(source, Path(dst), next(iter(tokens(getattr(config, "eos_token_id", None))), None))


def model_card(config: DMPTConfig, name: str, note: str | None, source: Source | None = None, *tags: str) -> str:
    """README.md of a checkpoint folder. source: what the weights come from, whose card states license and the like."""
    leaves = ", ".join(f"`{leaf}` {heads}" for leaf, heads in config.head_allocation.items())
    heads = ""
    if config.projected_heads:
        matrices = "one matrix for all leaves" if config.shared_anchor else "one matrix a leaf, its anchor's"
        heads = f" (projected: {matrices})"
    kind = "Dynamic Multiple Path Transformer (DMPT)" if config.splits else "transformer without splits"
    known = {} if source is None else inherited(source)
    body = f"""# {title(name)}

A {kind} built on GPT-2: {config.n_layer} blocks of width {config.n_embd}, context {config.n_positions},
vocabulary {config.vocab_size}, splits {config.splits}, vocabulary heads by leaf: {leaves}{heads}.

{note or "Made with dmpt-export."}

Quantize it with `dmpt-export quantize`, export it with `dmpt-export onnx`, look inside with `dmpt-export inspect`.
"""
    return card_text(model_fields([*tags_of(config.splits, config.n_vocab_heads), *tags], known), body)
