"""Read and write safetensors files, single or sharded. Every error names the damaged file and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.checkpoints.files import check_readable
from training.checkpoints.folder import INDEX, tensor_files
from training.errors import InputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_tensors(folder: Path, rename: Callable[[str], str | None] = lambda name: name) -> dict[str, Tensor]:
    """Float tensors of a model folder as float32, by `rename`d name (None: skip); memory-mapped where possible.

    Raises InputError for a missing, damaged or short file, a tensor that is not float, NaN and infinity.
    """
    out: dict[str, Tensor] = {}
    for path, wanted in tensor_files(folder):
        for name, tensor in _tensors_of(path, wanted):
            new = rename(name)
            if new is None:
                continue
            if new in out:
                raise InputError(f"{path} holds tensor '{new}' twice (as '{name}' too): export the model again")
            out[new] = as_float32(path, name, tensor)
    return out


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file. Raises OSError when writing to disk fails."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        system = re.search(r"os error (\d+)", str(error))  # the library reports it only in words
        if system is None:
            raise
        raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from error


def _tensors_of(path: Path, wanted: list[str] | None) -> Iterator[tuple[str, Tensor]]:
    try:
        check_readable(path)
        # The library checks the header: its size, that tensors fill the file without overlaps or gaps, and that each
        # tensor's byte count fits its shape and type.
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            absent = sorted(set(wanted or ()) - there)
            if absent:
                raise InputError(f"{path} lacks {', '.join(absent)}, which {INDEX} places there: fetch the model again")
            for name in sorted(there if wanted is None else wanted):
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error}): copy or fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def as_float32(path: Path, name: str, tensor: Tensor) -> Tensor:
    """`tensor` as float32. Raises InputError, naming it, when it is not float or holds NaN or infinity."""
    if tensor.dtype not in FLOATS:
        raise InputError(f"{path}: tensor '{name}' is {str(tensor.dtype).removeprefix('torch.')}, floats are expected")
    tensor = tensor.to(torch.float32)
    # One bad value spoils the sum, which is several times faster than checking each value; a sum may also overflow.
    if not torch.isfinite(tensor.sum()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(f"{path}: tensor '{name}' holds {bad} NaN or infinite values: use an undamaged checkpoint")
    return tensor
