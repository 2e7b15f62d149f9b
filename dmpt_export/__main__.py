"""`python -m dmpt_export`: the same as the `dmpt-export` command."""

from __future__ import annotations

import sys

from dmpt_export.cli.start import run

if __name__ == "__main__":
    sys.exit(run())
