"""Errors of the training side that are meant for people.

An exception that carries ``exit_code`` is a message for the user: the command line prints it as one
line and exits with that code; anything else is a bug and keeps its traceback. ``runtime.errors`` holds
the same family for the package that ships to devices and may import no sibling.
"""

from __future__ import annotations


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
