"""Summary of the graph of an ONNX folder: operators by type, and weights stored as floats."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx.helper import tensor_dtype_to_np_dtype

from dmpt_export.check.float_kernels import graphs, read_graph
from training.errors import InputError


def graph_of(file: Path) -> onnx.GraphProto:
    """The graph without its external weights. Raises InputError for a file that is not an ONNX model."""
    try:
        return read_graph(file).graph
    except (DecodeError, OSError) as error:
        raise InputError(f"{file} is not an ONNX model ({error}): export it again") from error


def operators(graph: onnx.GraphProto) -> dict[str, dict[str, int]]:
    """Nodes by operator: {"main": {operator: count}, "branches": the same inside the Ifs, both branches counted}."""
    main, *branches = ([node.op_type for node in part.node] for part in graphs(graph))
    inside = Counter(kind for branch in branches for kind in branch)
    return {"main": dict(Counter(main).most_common()), "branches": dict(inside.most_common())}


def float_tensors(graph: onnx.GraphProto, quantized: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Checkpoint tensors stored as floats in the graph, in the form of summary.tensors()."""
    packed = set(quantized)
    out: dict[str, dict[str, Any]] = {}
    for tensor in graph.initializer:
        names = stored_names(tensor.name)
        if names and packed.isdisjoint(names):
            dtype = tensor_dtype_to_np_dtype(tensor.data_type)
            size = int(np.prod(list(tensor.dims))) * dtype.itemsize // len(names)
            stored = {"scheme": dtype.name, "bits": 8 * dtype.itemsize, "block": None, "bytes": size}
            out |= {name: dict(stored) for name in names}
    return out


def stored_names(initializer: str) -> list[str]:
    """The checkpoint's tensors in an initializer, each an equal share; [] for initializers of the export alone.

    A quantized tensor's parts are <its name>.packed, .scales ...; heads.1_2.weight holds two heads (graph.rescore).

    >>> stored_names("heads.1_2.weight.scales"), stored_names("const.ones.4")
    (['heads.1.weight', 'heads.2.weight'], [])
    """
    if initializer.startswith("const.") or initializer.endswith((".attn.k_scale", ".attn.v_scale")):
        return []  # the exporter's own constants, and the scales of an int8 cache
    name = re.sub(r"(\.weight)\..*", r"\1", initializer)
    heads = re.fullmatch(r"heads\.([\d_]+)\.weight", name)
    return [f"heads.{j}.weight" for j in heads[1].split("_")] if heads else [name]
