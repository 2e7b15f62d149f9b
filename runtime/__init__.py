"""The part that ships to the device: runs an exported model with numpy, onnxruntime and tokenizers alone.

>>> import runtime
>>> with runtime.load("device") as model:                              # doctest: +SKIP
...     print(model.generate("Once upon a time", max_new_tokens=32))

Importing this package imports nothing heavy; `load` does.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from runtime.errors import ModelError, OutOfMemory, RequestError, SetupError

if TYPE_CHECKING:
    from runtime.model import Model

__all__ = ["ModelError", "OutOfMemory", "RequestError", "SetupError", "load"]


def load(
    folder: str | PathLike[str],
    device: str = "cpu",
    threads: int | None = None,
    *,
    verify: bool = True,
    deterministic: bool = False,
) -> Model:
    """Open an exported model folder (`dmpt-export onnx`) and make it ready to run.

    device: "cpu" or "cuda" (the folder must then be exported with `--target cuda`).
    threads: CPU threads for one run; None takes what this process may use (affinity and cgroup quota).
    verify: compare the sha256 of every file with the manifest, about 0.3 s per 500 MB. With False only
    names and sizes are checked.
    deterministic: one thread, and only algorithms that ONNX Runtime calls deterministic: equal requests then give
    equal bits however many CPUs there are, given the same ONNX Runtime and kind of processor. Otherwise the number of
    threads can change the last bits of a sum, and with them, rarely, a token.
    Raises ModelError (folder), SetupError (missing package or GPU), RequestError (bad device or threads),
    OutOfMemory.
    """
    from runtime.model import Model

    return Model(folder, device=device, threads=threads, verify=verify, deterministic=deterministic)
