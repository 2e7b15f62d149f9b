"""Errors of the training side that are meant for the user.

An exception with ``exit_code`` is a message for the user: the command line prints it as one line and exits with that
code. Any other exception is a bug and keeps its traceback. ``runtime.errors`` defines the same kinds for the package
that ships to devices and must not import this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PART = re.compile(r"\{([a-z_]*)\}")


class InputError(ValueError):
    """A folder, file or option value from the user cannot be used."""

    exit_code = 3

    def after(self, beginning: str) -> InputError:
        """The same error with words before it."""
        return type(self)(f"{beginning}{self}")


class FieldError(InputError):
    """An input that does not fit some field of a request (dmpt_export.requests).

    Names of fields stand in braces in the message, and each empty pair of braces is one of the values that follow; so
    braces in what a user wrote are just that. A command line shows its own names for the fields.

    >>> error = FieldError("{stride} {} must be at most {max_length}", "{stride}")
    >>> str(error)
    'stride {stride} must be at most max_length'
    >>> error.with_flags({"stride": "--stride", "max_length": "--max-length"})
    '--stride {stride} must be at most --max-length'
    """

    def __init__(self, message: str, *values: object) -> None:
        super().__init__(message, *values)
        self.message, self.values = message, values

    def __str__(self) -> str:
        return self.with_flags({})

    def with_flags(self, flags: Mapping[str, str]) -> str:
        """The message, with the names that a front end has for the fields; others keep their own."""
        values = iter(self.values)
        return PART.sub(lambda part: flags.get(part[1], part[1]) if part[1] else str(next(values)), self.message)

    def after(self, beginning: str) -> FieldError:
        return type(self)("{}" + self.message, beginning, *self.values)


class OptionError(FieldError):
    """Values of a request's fields that no model and no file could make right: wrong usage."""

    exit_code = 2


class ValidationError(RuntimeError):
    """A result failed its own check."""

    exit_code = 4


@contextmanager
def usage() -> Iterator[None]:
    """Errors that are meant for people, raised inside, are about the request alone: OptionError."""
    try:
        yield
    except FieldError as error:
        raise OptionError(error.message, *error.values) from error
    except (ValueError, RuntimeError) as error:
        if not hasattr(error, "exit_code"):
            raise
        raise OptionError("{}", error) from error


def install(*extras: str) -> str:
    """The command that adds extras to this installed package, which pip then takes from no index.

    >>> install("train", "cpu")
    "pip install 'dmpt-export[train,cpu]'"
    """
    return f"pip install 'dmpt-export[{','.join(extras)}]'"
