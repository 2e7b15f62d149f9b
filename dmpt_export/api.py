"""The Python interface: one function per command, and what `dmpt_export` offers by name.

>>> import dmpt_export
>>> dmpt_export.quantize("tuned", "small", scheme="int8")                 # doctest: +SKIP
>>> dmpt_export.export("small", "device")                                 # doctest: +SKIP
>>> dmpt_export.load("device").generate("The tide mill")                  # doctest: +SKIP

Keyword arguments are the fields of the requests (dmpt_export.requests), which carry the names of the command line's
options. All raise the errors of training.errors and runtime.errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpt_export.requests.compare import CompareRequest
from dmpt_export.requests.eval import EvaluateRequest
from dmpt_export.requests.onnx import ExportRequest
from dmpt_export.requests.quantize import Quantized, QuantizeRequest

if TYPE_CHECKING:
    from benchmarks.comparison.result import Comparison
    from benchmarks.quality.by_domain import DomainQuality
    from benchmarks.quality.perplexity import Quality

Place = str | PathLike[str]


def quantize(checkpoint: Place, out: Place, **fields: Any) -> Quantized:
    """Store the weights of a checkpoint in fewer bits, in the folder `out`; a report per tensor, and a plan's choices.

    fields: of QuantizeRequest, such as scheme="int8", rules=("heads.*=int4:64",), target_size=200_000_000.
    """
    request = QuantizeRequest(str(checkpoint), str(out), **fields)
    return request.run(request.check())


def export(checkpoint: Place, out: Place, **fields: Any) -> dict[str, Any]:
    """Export a checkpoint to the ONNX folder `out`, check it against torch, and return its manifest.

    fields: of ExportRequest, such as scheme="int8", target="cuda", fast_k=256.
    """
    request = ExportRequest(str(checkpoint), str(out), **fields)
    return request.run(request.check())


def evaluate(model: Place, data: Place | Sequence[Place], **fields: Any) -> Quality:
    """Perplexity, accuracy and use of paths of a model of any kind on text files. fields: of EvaluateRequest."""
    request = EvaluateRequest(str(model), several(data), **fields)
    request.check()
    quality = request.run().quality
    assert quality is not None  # there is data
    return quality


def evaluate_domains(model: Place, domains: Mapping[str, Place], **fields: Any) -> dict[str, DomainQuality]:
    """The same by domain of text, name -> file, and on every path alone where the model is a checkpoint."""
    pairs = tuple(f"{name}={file}" for name, file in domains.items())
    request = EvaluateRequest(str(model), domain=pairs, **fields)
    request.check()
    return request.run().domains


def compare(
    models: Sequence[Place], data: Place | Sequence[Place] = (), out: Place | None = None, **fields: Any
) -> Comparison:
    """Models side by side: size, quality on text files, speed; written to the folder `out` if given.

    models: folders, or NAME=FOLDER; fields: of CompareRequest, such as control=("NAME",).
    """
    request = CompareRequest(several(models), several(data), out=None if out is None else str(out), **fields)
    return request.run(request.check(), lambda comparison: None)


def several(places: Place | Sequence[Place]) -> tuple[str, ...]:
    """One path or many, as text."""
    return (str(places),) if isinstance(places, str | Path | PathLike) else tuple(str(place) for place in places)
