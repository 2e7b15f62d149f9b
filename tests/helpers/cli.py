"""The command line, in this process."""

from __future__ import annotations

from dmpt_export.cli.main import main


def run(*arguments: object) -> int:
    """The exit code of `dmpt-export` with these arguments."""
    return main([str(argument) for argument in arguments])
