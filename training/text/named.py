"""NAME=FILE, as command lines give texts with the names of their domains. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from training.errors import OptionError, usage
from training.model.domains import check_name


def named_texts(pairs: Iterable[str]) -> dict[str, list[str]]:
    """name -> files, in the order in which names first appear; a name may come several times.

    Raises OptionError for anything but NAME=FILE.

    >>> named_texts(["code=a.py", "prose=b.txt", "code=c.py"])
    {'code': ['a.py', 'c.py'], 'prose': ['b.txt']}
    """
    out: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise OptionError("{domain} '{}': give NAME=FILE, such as code=code.txt", pair)
        with usage():
            check_name(name)
        out.setdefault(name, []).append(file)
    return out


def files_of(pairs: Iterable[str]) -> list[str]:
    """The files of all domains. Raises OptionError as named_texts."""
    return [file for files in named_texts(pairs).values() for file in files]
