"""Which ids end a text: one rule for every verb, for training's separators and for the device.

1. `eos_token_id` of generation_config.json, one id or several; if absent,
2. `eos_token_id` of config.json; if absent or outside the vocabulary,
3. the tokenizer's end of text: its `eos_token`, else `<|endoftext|>`.

Ids beyond the vocabulary are left out: a GPT2Config made without eos_token_id keeps GPT-2's 50256 in models of any
size. The first id separates texts in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.checkpoints.files import read_json
from training.errors import InputError
from training.model.fields import END, check_generation, tokens
from training.model.shape import Shape
from training.progress import note_once
from training.text.tokenizer import end_of_text, has_tokenizer, load_tokenizer

GENERATION = "generation_config.json"


def end_ids(folder: Path, fields: Mapping[str, Any]) -> list[int]:
    """Ids that end a text of the model in `folder`, whose checked config.json has `fields`; [] if there are none.

    Raises InputError for a generation_config.json that cannot be used, or a damaged tokenizer.
    """
    size = fields.get("vocab_size", Shape.vocab_size)
    for given in (generation_ends(folder), tokens(fields.get("eos_token_id", Shape.eos_token_id))):
        if known := [token for token in dict.fromkeys(given) if token < size]:
            return known
    if not has_tokenizer(folder):
        return []
    token = end_of_text(load_tokenizer(folder), folder)
    return [token] if token is not None and token < size else []


def generation_ends(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json; prints a note, once, about settings that are not applied."""
    path = folder / GENERATION
    if not path.is_file():
        return []
    fields = read_json(path)
    ends = fields.get("eos_token_id")
    if not END.fits(ends):
        raise InputError(f"{path}: eos_token_id must be {END.words}, not {ends!r}")
    try:
        unused = check_generation(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if unused:
        note_once(f"{path}: defaults of Transformers' generate() that `run` takes as options: {', '.join(unused)}")
    return tokens(ends)
