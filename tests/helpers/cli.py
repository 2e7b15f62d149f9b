"""The command line, in this process and in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection

from dmpt_export.cli.main import main

TRAINING = ("torch", "transformers", "safetensors", "onnx", "onnx_ir", "accelerate")  # what a device does not have


def run(*arguments: object) -> int:
    """The exit code of `dmpt-export` with these arguments."""
    return main([str(argument) for argument in arguments])


def command_without(packages: Collection[str], *arguments: object) -> list[str]:
    """The command line of a process that cannot import these packages."""
    code = (
        f"import sys\nfor name in {tuple(packages)}: sys.modules[name] = None\n"
        f"from dmpt_export.cli.main import main\nsys.exit(main({[str(argument) for argument in arguments]!r}))"
    )
    return [sys.executable, "-c", code]


def run_without(packages: Collection[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """`dmpt-export` in a process that cannot import these packages."""
    return subprocess.run(command_without(packages, *arguments), capture_output=True, text=True, check=False)
