"""Check the form of a JSON value against a declaration; lists every fault, not only the first."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

HUGE = 1 << 40  # above any count, size in blocks or id; a file's size may reach it, a damaged number does


def whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value < HUGE


def name(value: object) -> bool:
    return isinstance(value, str) and value != ""


# A leaf of a declaration describes the value in words; the words select the check.
COUNT = "a whole number above 0"
ID = "a whole number, 0 or above"
NUMBER = "a number"
NUMBER_OR_NULL = "a number, or null"
COUNT_OR_NULL = "a whole number above 0, or null"
ID_OR_NULL = "a whole number, 0 or above, or null"
NAME = "a non-empty string"
NAME_OR_NULL = "a non-empty string, or null"
PAIR_OR_NULL = "a list of two names, or null"
OBJECT_OR_NULL = "an object or null"
SHAPE = "a list of sizes and names"
SHA256 = "64 hexadecimal digits"
VERSION = "a version such as 1.24"
BOOL = "true or false"

CHECKS: dict[str, Callable[[Any], bool]] = {
    COUNT: lambda v: whole(v, 1),
    ID: lambda v: whole(v, 0),
    COUNT_OR_NULL: lambda v: v is None or whole(v, 1),
    ID_OR_NULL: lambda v: v is None or whole(v, 0),
    NUMBER: lambda v: type(v) in (int, float),
    NUMBER_OR_NULL: lambda v: v is None or type(v) in (int, float),
    NAME: name,
    NAME_OR_NULL: lambda v: v is None or name(v),
    PAIR_OR_NULL: lambda v: v is None or (isinstance(v, list) and len(v) == 2 and all(map(name, v))),
    OBJECT_OR_NULL: lambda v: v is None or isinstance(v, dict),
    SHAPE: lambda v: isinstance(v, list) and all(whole(dim, 0) or name(dim) for dim in v),
    SHA256: lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None,
    VERSION: lambda v: isinstance(v, str) and re.fullmatch(r"\d{1,4}\.\d{1,4}", v) is not None,
    BOOL: lambda v: isinstance(v, bool),
}


@dataclass(frozen=True)
class Each:
    """An object with any keys whose values all have the same form."""

    form: Any


def faults(value: Any, form: Any, where: str = "") -> list[str]:
    """Every way in which `value` does not fit a form; empty when it fits.

    A form is a dict (an object with these fields; others are ignored), a list of one form (a list of such values),
    Each (an object of such values), or one of the descriptions above.

    >>> faults({"a": [1, -1]}, {"a": [ID], "b": NAME})
    ['a[1]: -1 is not a whole number, 0 or above', 'b: missing']
    """
    if isinstance(form, str):
        return [] if CHECKS[form](value) else [f"{where}: {shown(value)} is not {form}"]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where}: {shown(value)} is not a list"]
        return [fault for i, item in enumerate(value) for fault in faults(item, form[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where or 'the file'}: {shown(value)} is not an object"]
    stem = f"{where}." if where else ""
    if isinstance(form, Each):
        return [fault for key, item in value.items() for fault in faults(item, form.form, f"{stem}{key}")]
    missing = [f"{stem}{key}: missing" for key in form if key not in value]
    wrong = [f for key, inner in form.items() if key in value for f in faults(value[key], inner, f"{stem}{key}")]
    return wrong + missing


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def unsafe_name(file: str) -> str | None:
    """Why a file name must not be opened inside a folder, on any system; None when it may.

    >>> unsafe_name("../model.onnx")
    "'../model.onnx' is not a plain file name inside the folder"
    """
    plain = PurePosixPath(file).name == file == PureWindowsPath(file).name
    if plain and file not in ("", ".", "..") and ":" not in file and file.isprintable():
        return None
    return f"{file!r} is not a plain file name inside the folder"
