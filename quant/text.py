"""The tokens of a calibration text. Needs no torch, so that an unsuitable text is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError
from training.text.tokenizer import load_tokenizer
from training.text.windows import check_vocabulary, end_of_text_id, first_tokens

if TYPE_CHECKING:
    from training.model.shape import Shape

TOKENS = 8192  # of calibration text by default
LONGEST = 512  # tokens of a calibration window


def read_ids(text: str | Path, folder: Path, shape: Shape, tokens: int = TOKENS) -> NDArray[np.int64]:
    """The first `tokens` tokens of a text file for the model in `folder`, in whole windows: int64 [n, S], S at most
    LONGEST and the context.

    Raises InputError for an unreadable text, a text of less than one window, or a tokenizer that does not fit.
    """
    if tokens < 2:
        raise InputError(f"{tokens} calibration tokens are too few: give thousands")
    if not Path(text).is_file():
        raise InputError(f"calibration text {text} is not a file")
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, shape.vocab_size, folder)
    ids = first_tokens(Path(text), tokenizer, end_of_text_id(tokenizer, shape), tokens)
    length = min(LONGEST, shape.n_positions, tokens)
    if len(ids) < length:
        raise InputError(f"{text} has {len(ids)} tokens, calibration needs {length} or more: give a longer text")
    whole = len(ids) // length * length
    return ids[:whole].astype(np.int64).reshape(-1, length)
