"""Errors of the training side that are meant for the user.

An exception with ``exit_code`` is a message for the user: the command line prints it as one line and exits with that
code. Any other exception is a bug and keeps its traceback. ``runtime.errors`` defines the same kinds for the package
that ships to devices and must not import this one.
"""

from __future__ import annotations


class InputError(ValueError):
    """A folder, file or option value from the user cannot be used."""

    exit_code = 3


class ValidationError(RuntimeError):
    """A result failed its own check."""

    exit_code = 4


def install(*extras: str) -> str:
    """The command that installs extras of this project from a checkout: it is in no package index.

    >>> install("train", "cpu")
    "pip install '.[train,cpu]' in the checkout of dmpt-export"
    """
    return f"pip install '.[{','.join(extras)}]' in the checkout of dmpt-export"
