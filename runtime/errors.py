"""Errors of the runtime that are meant for the user.

An exception with ``exit_code`` is a message for the user: the command line prints it as one line and exits with that
code. Any other exception is a bug and keeps its traceback. ``training.errors`` defines the same kinds for the packages
that the runtime, which ships to devices, must not import.
"""

from __future__ import annotations

# torch and ONNX Runtime report memory through plain RuntimeErrors, or subclasses that light modules must not import.
MEMORY_MESSAGES = ("can't allocate memory", "failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")


class ModelError(ValueError):
    """The model folder cannot be used: missing, foreign, damaged, or not made for this device."""

    exit_code = 3


class RequestError(ValueError):
    """A loaded model cannot do what was requested: invalid token ids, prompt or sampling value."""

    exit_code = 3


class SetupError(RuntimeError):
    """This machine lacks something the runtime needs: a package, or a GPU that works."""

    exit_code = 3


class CheckError(RuntimeError):
    """The model runs, but does not compute on this device what its export must give."""

    exit_code = 4


class OutOfMemory(MemoryError):
    """ONNX Runtime could not get the memory it needs."""

    exit_code = 5


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error, of any library, means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    native = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return native and any(text in str(error).lower() for text in MEMORY_MESSAGES)


def install(extra: str) -> str:
    """The command that adds an extra to this installed package, which pip then takes from no index.

    >>> install("cpu")
    "pip install 'dmpt-export[cpu]'"
    """
    return f"pip install 'dmpt-export[{extra}]'"
