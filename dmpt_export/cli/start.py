"""Where the program starts: Ctrl-C ends it cleanly from its first import on."""

from __future__ import annotations

import signal
import sys

from dmpt_export.cli import INTERRUPTED


def run() -> int:
    """The command line; returns the exit code."""
    try:
        from dmpt_export.cli.main import main

        code = main()
    except KeyboardInterrupt:  # in an import: main() catches it later
        sys.stderr.write("Interrupted\n")
        code = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, and its outcome stays while Python ends
    return code
