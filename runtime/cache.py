"""Key/value caches of all blocks, for one text or several; the device updates them in place."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.session import Engine

FIRST_CAPACITY = 128  # tokens


def roomier(capacity: int, total: int, context: int) -> int:
    """Capacity for `total` tokens: the current one, doubled as often as needed, up to the context.

    >>> roomier(0, 1, 300), roomier(128, 129, 300), roomier(256, 257, 300)
    (128, 256, 300)
    """
    capacity = max(capacity, FIRST_CAPACITY)
    while capacity < total:
        capacity *= 2
    return min(capacity, context)


def zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Keys or values of several texts: memory that the system provides page by page, when it is first written.

    numpy asks for pages of 2 MB, with which short texts would take the memory of whole contexts.
    """
    kind = np.dtype(dtype)
    if shape[0] == 1 or 0 in shape:
        return np.zeros(shape, kind)
    memory = mmap.mmap(-1, math.prod(shape) * kind.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind).reshape(shape)


class Buffer:
    """Keys or values of one block: [rows, n_head, capacity, head_dim]."""

    def __init__(self, array: NDArray[Any], engine: Engine) -> None:
        self.engine = engine
        self.dtype, self.shape = array.dtype.type, array.shape
        self.row_bytes = array.nbytes // max(1, len(array))
        if engine.device == "cpu":
            self.array: NDArray[Any] | None = array
            self.address: int = array.ctypes.data
        else:
            self.array, self.value = None, engine.on_device(array)
            self.address = self.value.data_ptr()

    def host(self) -> NDArray[Any]:
        """The array itself on the CPU, a copy of it from a GPU."""
        return self.value.numpy() if self.array is None else self.array

    def place(self, first: int, rows: int) -> tuple[Any, ...]:
        """Type, shape and address of some consecutive rows, in the form that IOBinding takes."""
        address = self.address + first * self.row_bytes
        return self.engine.device, 0, self.dtype, (rows, *self.shape[1:]), address


class Caches:
    """All buffers of a model, by cache name."""

    def __init__(self, engine: Engine, rows: int = 1, capacity: int = 0) -> None:
        """rows: number of texts; capacity: tokens of each. Raises OutOfMemory on a GPU."""
        self.engine, self.rows, self.capacity = engine, rows, capacity
        manifest = engine.manifest
        self.node_of = {name: node.name for node in manifest.tree for name in node.caches}
        config = manifest.config
        shape = (rows, config.n_head, capacity, config.head_dim)
        self.buffers = {name: Buffer(zeros(shape, manifest.cache_dtype), engine) for name in self.node_of}

    def bind(self, binding: Any, first: int = 0, rows: int | None = None) -> None:
        """Bind these rows as both the inputs and the outputs of the graph."""
        for name, buffer in self.buffers.items():
            place = buffer.place(first, self.rows if rows is None else rows)
            binding.bind_input(f"past.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def grow(self, capacity: int, filled: Mapping[str, int]) -> None:
        """Make room for `capacity` tokens; each node's first `filled` tokens are kept."""

        def larger(name: str, old: NDArray[Any]) -> NDArray[Any]:
            new = zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            kept = filled[self.node_of[name]]
            new[:, :, :kept] = old[:, :, :kept]
            return new

        self.replace(larger)
        self.capacity = capacity

    def fill(self, row: int, content: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite the beginning of one text's keys and values: by cache name, [n_head, tokens, head_dim]."""
        for name, first in content.items():
            array = self.buffers[name].host()
            array[row, :, : first.shape[1]] = first
            if self.engine.device != "cpu":  # host() is a copy
                self.buffers[name] = Buffer(array, self.engine)

    def reorder(self, index: NDArray[np.int64], filled: int) -> None:
        """Replace text i by the first `filled` tokens of text index[i]; texts may be repeated and left out.

        In place on the CPU, unless there are more texts than before; texts that keep their row cost nothing.
        """
        moved = np.flatnonzero(index != np.arange(len(index)))
        if len(index) <= self.rows and self.engine.device == "cpu":
            for buffer in self.buffers.values() if len(moved) else ():
                array = buffer.host()
                array[moved, :, :filled] = array[index[moved], :, :filled]
            return
        self.replace(lambda _, old: old[index])
        self.rows = len(index)

    def replace(self, change: Callable[[str, NDArray[Any]], NDArray[Any]]) -> None:
        """Replace each buffer by one made from its content, one at a time."""
        for name, buffer in self.buffers.items():
            self.buffers[name] = Buffer(change(name, buffer.host()), self.engine)
