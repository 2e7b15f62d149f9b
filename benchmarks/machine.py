"""Machine and versions of a measurement, recorded with every number."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from benchmarks.speed.worker import installed
from runtime.threads import visible_cpus

PACKAGES = ("dmpt-export", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers", "torch", "transformers")


def machine() -> dict[str, Any]:
    """CPU model, cores available to this process, memory, system."""
    return {"cpu": cpu_model(), "cores": visible_cpus(), "memory_bytes": memory_bytes(), "system": platform.platform()}


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter, without importing them; missing ones are left out."""
    found = {package: installed(package) for package in PACKAGES}
    return {"python": platform.python_version(), **{name: known for name, known in found.items() if known is not None}}


def command_line() -> list[str]:
    """The arguments unchanged, after a program name that does not reveal this machine's folders."""
    return ["dmpt-export", *sys.argv[1:]]
