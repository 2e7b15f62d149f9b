"""Errors of the runtime that are meant for people.

An exception that carries ``exit_code`` is a message for the user: the command line prints it as one line
and exits with that code; anything else is a bug and keeps its traceback. ``training.errors`` holds the same
family for the packages that this one, which ships to devices, must not import.
"""

from __future__ import annotations

# torch and ONNX Runtime report memory through plain RuntimeErrors, or subclasses that light modules must not import.
MEMORY_MESSAGES = ("can't allocate memory", "failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")


class ModelError(ValueError):
    """The model folder cannot be used: missing, foreign, damaged, or not made for this device."""

    exit_code = 3


class RequestError(ValueError):
    """What was asked of a loaded model cannot be done: token ids, a prompt or a sampling value."""

    exit_code = 3


class SetupError(RuntimeError):
    """This machine lacks something the runtime needs: a package, or a GPU that works."""

    exit_code = 3


class OutOfMemory(MemoryError):
    """ONNX Runtime could not get the memory it needs."""

    exit_code = 5


def is_out_of_memory(error: Exception) -> bool:
    """Whether any library says with this that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    native = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return native and any(text in str(error).lower() for text in MEMORY_MESSAGES)
