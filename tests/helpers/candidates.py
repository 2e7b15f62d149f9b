"""The operators that score heads on candidates, in a graph of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from dmpt_export.check.float_kernels import use_float_kernels
from dmpt_export.graph.builder import MSFT, Builder
from dmpt_export.graph.rescore import candidate_logits, groups
from runtime.ort import import_onnxruntime
from training.model.config import DMPTConfig


def scored_candidates(
    config: DMPTConfig, weights: Mapping[str, Any], rng: np.random.Generator, n: int, heads: int, exact: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows [n, E], as many candidates of each as fast_k says [n, K], and what `heads` heads of a single leaf
    give them [n, heads, K]. exact: by float kernels."""
    width, vocabulary, k = config.n_embd, config.vocab_size, config.fast_k or 0
    b = Builder()
    h, ids = ir.val("h", ir.DataType.FLOAT, [1, n, width]), ir.val("c", ir.DataType.INT64, [1, n, k])
    (group,) = groups(config, weights, "root")
    out, _ = candidate_logits(b, config, weights, "root", group, h, {}, ids)
    out.dtype, out.shape = ir.DataType.FLOAT, ir.Shape([1, n, heads, k])
    graph = ir.Graph([h, ids], [out], nodes=b.nodes, initializers=list(b.initializers.values()),
                     opset_imports={"": 21, MSFT: 1}, name="candidates")  # fmt: skip
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    if exact:
        use_float_kernels(proto)
    session = import_onnxruntime().InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.normal(size=(n, width)).astype(np.float32)
    c = np.array([rng.permutation(vocabulary)[:k] for _ in range(n)], np.int64).reshape(n, k)
    (got,) = session.run(None, {"h": x[None], "c": c[None]})
    return x, c, got[0]
