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
