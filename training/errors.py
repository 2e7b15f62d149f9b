"""Errors of the training side that are meant for people.

An exception that carries ``exit_code`` is a message for the user: the command line prints it as one
line and exits with that code; anything else is a bug and keeps its traceback. ``runtime.errors`` holds
the same family for the package that ships to devices and may import no sibling.
"""

from __future__ import annotations

# torch and ONNX Runtime report memory through plain RuntimeErrors, or subclasses that light modules must not import.
MEMORY_MESSAGES = ("can't allocate memory", "failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")


class InputError(ValueError):
    """Something the user gave (folder, file, option value) cannot be used."""

    exit_code = 3


class ValidationError(RuntimeError):
    """A result did not pass its own check."""

    exit_code = 4


def install(*extras: str) -> str:
    """The command that adds extras of this project, which lies in no package index: it is installed from a checkout.

    >>> install("train", "cpu")
    "pip install '.[train,cpu]' in the checkout of dmpt-export"
    """
    return f"pip install '.[{','.join(extras)}]' in the checkout of dmpt-export"


def is_out_of_memory(error: Exception) -> bool:
    """Whether any library says with this that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    native = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return native and any(text in str(error).lower() for text in MEMORY_MESSAGES)
