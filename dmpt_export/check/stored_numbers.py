"""Whether a graph holds the checkpoint's weights, every number of them.

Running it on some tokens judges what these meet: not the positions behind them, nor rows of the vocabulary that none of
them is, or is likely to be followed by. So each initializer is also held against the checkpoint, read anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from dmpt_export.check.float_kernels import initializers, read_graph
from dmpt_export.inspect.graph_summary import stored_names
from quant.checkpoint import load_weights
from quant.forms.delta import LEFT, RIGHT
from quant.forms.weights import Weight, form_of
from training.errors import ValidationError


def check_stored(graph: Path, source: Path) -> int:
    """Compare all initializers that hold tensors of the checkpoint `source`; how many numbers were equal.

    Raises ValidationError that names the first tensor that is another, and its first such row.
    """
    _, weights = load_weights(source)
    compared = 0
    for tensor in initializers(read_graph(graph).graph):
        names = stored_names(tensor.name)
        if not names or not all(name in weights for name in names):
            continue
        found = numpy_helper.to_array(tensor, base_dir=str(graph.parent))
        part = tensor.name.partition(".weight.")[2]
        for name, own, want in shares(found, [weights[name] for name in names], names, part):
            wanted = want.astype(found.dtype, copy=False).reshape(own.shape)
            if not np.array_equal(own, wanted):
                row = int(np.flatnonzero((own != wanted).reshape(len(own), -1).any(1))[0])
                raise ValidationError(f"{tensor.name}: what the graph holds of {name} is another from row {row} on")
        compared += found.size
    return compared


def shares(
    found: NDArray[np.generic], weights: Sequence[Weight], names: Sequence[str], part: str
) -> list[tuple[str, NDArray[np.generic], NDArray[np.generic]]]:
    """(tensor, what an initializer holds of it, what the checkpoint does); several are laid out as graph.rescore and
    graph.deltas do it: rows side by side, right factors one under the other, one left factor for all."""
    if part.startswith(LEFT):
        weights, names = weights[:1], names[:1]
    parts = [form_of(weight).graph_part(part) for weight in weights]
    if part.startswith(RIGHT):
        own = np.split(found, len(parts))
    else:
        rows = found.reshape(found.shape[0], len(parts), -1) if found.ndim else found.reshape(1, 1, 1)
        own = [rows[:, i] for i in range(len(parts))]
    return list(zip(names, own, parts, strict=True))
