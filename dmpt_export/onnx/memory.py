"""Memory that earlier steps of an export no longer need."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

SMALL = 16e6  # bytes of a folder; collecting garbage takes 0.2 s with torch loaded


def give_back_memory(folder: Path) -> None:
    """Release the memory of earlier steps, so that its fragments do not add to the peak of the next one; not for small
    models. folder: a checkpoint or an export of the model."""
    if sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < SMALL:
        return
    gc.collect()  # a model's modules, and a graph's nodes and values, refer to each other
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc
        trim(0)
