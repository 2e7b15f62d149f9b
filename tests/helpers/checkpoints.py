"""Changes to checkpoint folders, and the form of an error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.errors import InputError


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def one_line(match: str, *names: str) -> Iterator[None]:
    """InputError for people: exit code 3, one line, naming the things it is about."""
    with pytest.raises(InputError, match=match) as caught:
        yield
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    for name in names:
        assert name in message
