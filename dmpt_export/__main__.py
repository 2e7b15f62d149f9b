"""`python -m dmpt_export`: the same as the `dmpt-export` command."""

from __future__ import annotations

import sys

from dmpt_export.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
