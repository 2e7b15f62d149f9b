"""Which optional dependencies a verb needs, and the one line that says how to get them."""

from __future__ import annotations

from importlib.util import find_spec

# extra -> the modules it brings; checked without importing them
MODULES: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "cuda": ("onnxruntime",),
    "train": ("torch", "transformers", "accelerate", "safetensors", "onnx", "onnx_ir"),
    "bench": ("psutil",),
    "data": ("zstandard", "pyarrow", "datasets"),
    "optimum": ("optimum",),
    "bnb": ("bitsandbytes",),
}


class MissingExtra(RuntimeError):
    """An optional dependency is not installed."""

    exit_code = 3


def require(*extras: str) -> None:
    """Raise MissingExtra, naming the `pip install` to run, unless all modules of the extras can be found.

    Called first in every command, so that a missing package is said at once and not after a long pass.

    >>> require("cpu", "train")
    """
    missing = {extra: [m for m in MODULES[extra] if find_spec(m) is None] for extra in extras}
    lacking = [extra for extra, modules in missing.items() if modules]
    if lacking:
        from training.errors import install

        names = ", ".join(dict.fromkeys(m for modules in missing.values() for m in modules))
        raise MissingExtra(f"this command needs {names}: {install(*lacking)}")
