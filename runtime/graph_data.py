"""Which data files an ONNX graph names, read before ONNX Runtime opens them. Standard library only.

A graph's file is a protobuf message (onnx.proto3, "ModelProto"). A tensor outside it has entries (key, value) that name
its file, anywhere among the initializers, attributes, branches and functions. This reader follows every field that can
hold a tensor and takes every value of such entries, so what it finds includes whatever ONNX Runtime can find.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ModelError

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types; groups (3, 4) do not occur in ONNX
FIXED = {EIGHT_BYTES: 8, FOUR_BYTES: 4}
MODEL, TRAINING, FUNCTION, GRAPH, NODE, ATTRIBUTE, SPARSE, TENSOR, ENTRY = (
    "model", "training", "function", "graph", "node", "attribute", "sparse", "tensor", "entry",
)  # fmt: skip
# message -> number of each field that leads to tensors -> its message
FIELDS = {
    MODEL: {7: GRAPH, 20: TRAINING, 25: FUNCTION},
    TRAINING: {1: GRAPH, 2: GRAPH},
    FUNCTION: {7: NODE, 11: ATTRIBUTE},
    GRAPH: {1: NODE, 5: TENSOR, 15: SPARSE},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE},
    SPARSE: {1: TENSOR, 2: TENSOR},
    TENSOR: {13: ENTRY},
}
KEY, VALUE = 1, 2  # fields of an entry
LOCATION = b"location"


def data_files(path: Path) -> set[str]:
    """All data files that the graph in a file names, in its own words (`../x` too). Raises ModelError for a damaged
    file."""
    data = memoryview(path.read_bytes())
    names: set[bytes] = set()
    left: list[tuple[str, memoryview]] = [(MODEL, data)]  # messages to read; branches may be nested deeply
    try:
        while left:
            kind, message = left.pop()
            if kind == ENTRY:
                names.update(locations(message))
                continue
            inner = FIELDS[kind]
            left += [(inner[number], value) for number, value in parts(message) if number in inner]
        return {name.decode("utf-8") for name in names}
    except ValueError as error:
        raise ModelError(f"cannot load {path}: it is not an ONNX graph ({error}): copy or export it again") from error


def locations(entry: memoryview) -> Iterator[bytes]:
    """The values of an entry that names a file. A field that is repeated counts each time: readers differ."""
    found = [(number, bytes(value)) for number, value in parts(entry) if number in (KEY, VALUE)]
    if (KEY, LOCATION) in found:
        yield from (value for number, value in found if number == VALUE)


def parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of each field with a length. Raises ValueError where the message is damaged."""
    at, end = 0, len(message)
    while at < end:
        tag, at = varint(message, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < tag < 1 << 32 or not number:
            raise ValueError("a field has no valid number")
        if wire == VARINT:
            _, at = varint(message, at)
            continue
        if wire != LENGTH and wire not in FIXED:
            raise ValueError(f"a field has the unknown type {wire}")
        size, at = varint(message, at) if wire == LENGTH else (FIXED[wire], at)
        if at + size > end:
            raise ValueError("it ends too early")
        if wire == LENGTH:
            yield number, message[at : at + size]
        at += size


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, place after it) of a number of up to ten bytes, seven bits each, the lowest first."""
    value = 0
    for i in range(10):
        if at + i >= len(message):
            raise ValueError("it ends too early")
        byte = message[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("a number has more than ten bytes")
