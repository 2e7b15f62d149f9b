"""Check the ONNX Runtime version and, on Arm, the processor that a model needs, before a session is created."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

import numpy as np

from runtime.errors import ModelError, SetupError
from runtime.manifest import Manifest

ARM = ("aarch64", "arm64")
AT_HWCAP, HWCAP_ASIMDDP = 16, 1 << 20  # Linux, asm/hwcap.h of arm64
AT_HWCAP2 = 26
ARM_FEATURES = {"I8MM": 1 << 13, "BF16": 1 << 14, "SME": 1 << 23}  # of HWCAP2; unknown to numpy
# Names of numpy for what selects kernels in ONNX Runtime.
KNOWN = (
    "SSE41", "AVX", "AVX2", "FMA3", "AVX512F", "AVX512_SKX", "AVX512VNNI", "AVX512BF16",
    "NEON", "ASIMD", "ASIMDHP", "ASIMDDP", "SVE",
)  # fmt: skip
PF_ARM_V82_DP = 43  # Windows, IsProcessorFeaturePresent
INT8_BATCHES_RIGHT = (1, 28)  # 1.27 attends to the wrong rows of int8 caches when it decodes several texts together
EMPTY_TOPK_RIGHT = (1, 31)  # 1.30 and earlier divide by the number of rows
OUTER_SCALES_FIXED = (1, 29)  # 1.28 and earlier read a null pointer; measured from 1.22 to 1.32 under emulation


def check_runtime(version: str, manifest: Manifest, folder: Path) -> None:
    """Raise SetupError for an onnxruntime older than the export needs, and ModelError for one that would crash on it.

    The crash: 4-bit products inside a branch whose scales belong to the main graph (exports without
    `branches_own_scales`), on an Arm processor with dot-product instructions. ONNX Runtime packs such weights together
    with their scales and does not find the scales.
    """
    least = manifest.least_onnxruntime
    if least is not None and numbers(version) < numbers(least):
        raise SetupError(
            f"{folder} needs onnxruntime {least} or later, {version} is installed: "
            f"pip install --upgrade 'onnxruntime>={least}'"
        )
    if numbers(version) < OUTER_SCALES_FIXED and manifest.has_outer_scales and has_dot_product():
        raise ModelError(
            f"{folder} comes from an earlier dmpt-export, and its 4-bit weights crash onnxruntime {version} on this "
            "Arm processor: export the model again with `dmpt-export onnx`, or "
            "pip install --upgrade 'onnxruntime>=1.29'"
        )


def check_batches(version: str, manifest: Manifest) -> None:
    """Raise SetupError where this onnxruntime decodes several texts incorrectly, and ModelError where it would crash on
    an earlier export. Exports that state the version they need were already checked when loaded."""
    if manifest.cache_dtype == "int8" and numbers(version) < INT8_BATCHES_RIGHT:
        raise SetupError(
            f"onnxruntime {version} decodes several texts incorrectly with an int8 KV cache: "
            "give one prompt at a time, or pip install --upgrade 'onnxruntime>=1.28'"
        )
    if numbers(version) < EMPTY_TOPK_RIGHT and manifest.searches_empty_leaves:
        raise ModelError(
            f"this model comes from an earlier dmpt-export, and several texts at once crash onnxruntime {version} with "
            "it: export it again with `dmpt-export onnx`, give one prompt at a time, or "
            "pip install --upgrade 'onnxruntime>=1.31'"
        )


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison.

    >>> numbers("1.29.0.dev2") < numbers("1.32"), numbers("1.9") < numbers("1.23")
    (True, True)
    """
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def has_dot_product() -> bool:
    """Whether this is an Arm processor with dot-product instructions (SDOT, UDOT); False where that is unknown."""
    if platform.machine().lower() not in ARM:
        return False
    system: str = sys.platform
    try:
        if system == "linux":
            return bool(auxiliary(AT_HWCAP) & HWCAP_ASIMDDP)
        if system == "win32":
            return bool(ctypes.CDLL("kernel32").IsProcessorFeaturePresent(PF_ARM_V82_DP))
    except (AttributeError, OSError):
        return False
    return system == "darwin"  # every Mac with an Arm processor has them


def auxiliary(kind: int) -> int:
    """An entry of the auxiliary vector in which Linux describes the processor. Raises AttributeError or OSError."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(kind))


def features() -> list[str]:
    """Instruction sets of this processor that select kernels, by numpy's names; empty where they are unknown.

    Asked of the processor, so that an emulator reports its own; /proc/cpuinfo would show its host's.
    """
    core = getattr(np, "_core", None) or getattr(np, "core", None)
    found = getattr(getattr(core, "_multiarray_umath", None), "__cpu_features__", {})
    names = [name for name in KNOWN if found.get(name)]
    if platform.machine().lower() in ARM and sys.platform == "linux":
        try:
            bits = auxiliary(AT_HWCAP2)
        except (AttributeError, OSError):
            return names
        names += [name for name, bit in ARM_FEATURES.items() if bits & bit]
    return names
