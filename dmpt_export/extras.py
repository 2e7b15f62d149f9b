"""Check the optional dependencies of a verb, and report how to install them."""

from __future__ import annotations

from importlib.util import find_spec

# extra -> its modules; checked without importing them
MODULES: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "cuda": ("onnxruntime",),
    "train": ("torch", "transformers", "accelerate", "safetensors", "onnx", "onnx_ir"),
    "serve": ("starlette", "uvicorn"),
    "bench": ("psutil",),
    "data": ("zstandard", "pyarrow", "datasets"),
    "optimum": ("optimum.onnxruntime",),  # this project puts a file under `optimum` itself
    "bnb": ("bitsandbytes",),
}


class MissingExtra(RuntimeError):
    """An optional dependency is not installed."""

    exit_code = 3


def require(*extras: str) -> None:
    """Raise MissingExtra with the `pip install` command unless all modules of the extras can be found.

    Called first in every command, so that a missing package is reported at once and not after a long run.

    >>> require("cpu", "train")
    """
    missing = {extra: [m for m in MODULES[extra] if not is_there(m)] for extra in extras}
    lacking = [extra for extra, modules in missing.items() if modules]
    if lacking:
        from training.errors import install

        names = ", ".join(dict.fromkeys(m for modules in missing.values() for m in modules))
        raise MissingExtra(f"this command needs {names}: {install(*lacking)}")


def is_there(module: str) -> bool:
    """Whether a module can be found; of `a.b`, `a` is imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
