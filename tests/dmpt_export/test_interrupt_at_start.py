"""Ctrl-C while the program imports, or after its work: exit code 130 and one line, or the outcome that it had."""

from __future__ import annotations

import subprocess
import sys

import pytest

INTERRUPTED_IMPORT = """
import sys

class Interrupt:
    def find_spec(self, name, *rest):
        if name == MODULE:
            raise KeyboardInterrupt

MODULE = sys.argv.pop()
sys.meta_path.insert(0, Interrupt())
from dmpt_export.cli.start import run
sys.exit(run())
"""


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["dmpt_export.cli.main", "click", "runtime.ort", "dmpt_export.cli.run"])
def test_an_interrupted_import_is_one_line(module: str) -> None:
    done = run(INTERRUPTED_IMPORT, "run", "nowhere", "hello", module)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "Interrupted", "")


def test_an_interrupt_after_the_work_changes_nothing() -> None:
    script = (
        "import atexit, os, signal, sys\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "from dmpt_export.cli.start import run\n"
        "sys.argv[1:] = ['--version']\n"
        "sys.exit(run())\n"
    )
    done = run(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dmpt-export")
