"""Check that a graph holds every number of the checkpoint's weights.

A run on some tokens only checks the weights that these tokens use: not later positions, nor vocabulary rows of tokens
that neither occur nor are likely to follow. So each initializer is also compared with the checkpoint, read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from dmpt_export.check.float_kernels import initializers, read_graph
from dmpt_export.graph.drafts import draft_weights
from dmpt_export.inspect.graph_summary import stored_names
from quant.checkpoint import load_weights
from quant.forms.delta import LEFT, RIGHT
from quant.forms.weights import Weight, form_of
from training.errors import ValidationError


def check_stored(graph: Path, source: Path, draft_vocabulary: NDArray[np.int64] | None = None) -> int:
    """Compare all initializers that hold tensors of the checkpoint `source`; returns how many numbers were equal.

    draft_vocabulary: the shortlist of draft heads, whose rows of vocabulary matrices are stored again.

    Raises ValidationError naming the first tensor that differs and its first differing row.
    """
    config, weights = load_weights(source)
    if draft_vocabulary is not None:
        weights = {**weights, **draft_weights(config, weights, draft_vocabulary)}
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
                raise ValidationError(f"{tensor.name}: {name} differs from the checkpoint, first at row {row}")
        compared += found.size
    return compared


def shares(
    found: NDArray[np.generic], weights: Sequence[Weight], names: Sequence[str], part: str
) -> list[tuple[str, NDArray[np.generic], NDArray[np.generic]]]:
    """Yield (tensor, its part of an initializer, its part in the checkpoint). Several tensors are laid out as in
    graph.rescore and graph.deltas: rows side by side, right factors stacked, one left factor for all."""
    if part.startswith(LEFT):
        weights, names = weights[:1], names[:1]
    parts = [form_of(weight).graph_part(part) for weight in weights]
    if part.startswith(RIGHT):
        own = np.split(found, len(parts))
    else:
        rows = found.reshape(found.shape[0], len(parts), -1) if found.ndim else found.reshape(1, 1, 1)
        own = [rows[:, i] for i in range(len(parts))]
    return list(zip(names, own, parts, strict=True))
