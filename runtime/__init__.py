"""The runtime that ships to devices: runs an exported model with only numpy, onnxruntime and tokenizers.

>>> import runtime
>>> with runtime.load("device") as model:                              # doctest: +SKIP
...     print(model.generate("Once upon a time", max_new_tokens=32))

Importing this package imports nothing heavy; `load` does.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from runtime.errors import CheckError, ModelError, OutOfMemory, RequestError, SetupError

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.sequence import Sequence

__all__ = ["CheckError", "ModelError", "OutOfMemory", "RequestError", "SetupError", "load", "load_prompt"]


def load(
    folder: str | PathLike[str],
    device: str = "cpu",
    threads: int | None = None,
    *,
    verify: bool = True,
    deterministic: bool = False,
    self_check: bool = False,
) -> Model:
    """Load an exported model folder (`dmpt-export onnx`) so that it is ready to run.

    device: "cpu", or "cuda" for a folder exported with `--target cuda`.
    threads: CPU threads per run; None: all that this process may use (affinity and cgroup quota).
    verify: compare the sha256 of every file with the manifest, about 0.3 s per 500 MB. False checks only names and
    sizes.
    deterministic: use one thread, and only algorithms that ONNX Runtime calls deterministic. Equal requests then give
    equal bits on any number of CPUs, with the same ONNX Runtime and kind of processor. Otherwise the number of threads
    can change the last bits of a sum and so, rarely, a token.
    self_check: run the proof that the export left in the folder, a few dozen tokens, and raise CheckError where this
    device computes something different, as `dmpt-export check` does. Model.self_check() returns the figures.
    Raises ModelError (folder), SetupError (missing package or GPU), RequestError (bad device or threads),
    OutOfMemory.
    """
    from runtime.model import Model

    model = Model(folder, device=device, threads=threads, verify=verify, deterministic=deterministic)
    if self_check:
        try:
            model.self_check().require()
        except BaseException:
            model.close()
            raise
    return model


def load_prompt(model: Model, path: str | PathLike[str]) -> Sequence:
    """The text that `Sequence.save` wrote, with its caches, to generate `after` it or to feed further tokens to.

    Raises RequestError for a file that is missing, damaged, of a later format, or saved with another model or another
    export of it.
    """
    from runtime.sequence import Sequence

    return Sequence.load(model.engine, path)
