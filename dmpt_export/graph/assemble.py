"""The whole graph: inputs, trunk, routing, heads, outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.blocks import Past, Stream, Timeline, block_prefixes, embed, norm_stream, segment
from dmpt_export.graph.builder import MSFT, Builder, Spec
from dmpt_export.graph.drafts import Drafter
from dmpt_export.graph.heads import leaf_log_probs
from dmpt_export.graph.routing import Router, Tail
from quant.forms.weights import Weights
from runtime.graph_io import DRAFTING, DRAFTS, graph_inputs, graph_outputs
from training.model.config import DMPTConfig
from training.model.shape import ROOT

OPSETS = range(20, 25)  # ReduceMax of bool and Gelu came with 20; tested up to 24
OPSET = 21
INT8, FLOAT = ir.DataType.INT8, ir.DataType.FLOAT


def input_specs(config: DMPTConfig, dtype: ir.DataType, cache: ir.DataType) -> list[Spec]:
    """Graph inputs in order."""
    rows, kept = dtype.numpy().name, cache.numpy().name
    nodes = [*config.tree.values()]
    return [Spec.of(spec) for spec in graph_inputs(nodes, config, rows, kept, config.next_tokens)]


def output_specs(config: DMPTConfig, dtype: ir.DataType, cache: ir.DataType) -> list[Spec]:
    """Graph outputs in order."""
    rows, kept, nodes = dtype.numpy().name, cache.numpy().name, [*config.tree.values()]
    specs = graph_outputs(nodes, config, rows, kept, config.leaves, config.head_allocation, config.next_tokens)
    return [Spec.of(spec) for spec in specs]


def build(
    config: DMPTConfig,
    weights: Weights,
    dtype: ir.DataType = FLOAT,
    scales: Mapping[str, np.ndarray] | None = None,
    opset: int = OPSET,
    draft_vocabulary: np.ndarray | None = None,
    untiled: bool = False,
) -> ir.Model:
    """The graph of one model.

    `weights` maps the checkpoint's tensor names to float arrays or QuantizedTensors; `dtype` is the type of
    activations and caches (FLOAT or FLOAT16). `config.fast_k` and `config.head_topk` are fixed in the graph. `scales`
    (see dmpt_export.onnx.kv_cache) makes the caches int8. draft_vocabulary: int64 [n], tokens that draft heads choose
    among, if there are any; None: all. untiled: see Timeline.
    """
    cache = INT8 if scales else dtype
    weights = {**weights, **(scales or {})}
    b = Builder(dtype)
    inputs = {spec.name: spec.value() for spec in input_specs(config, dtype, cache)}
    time = Timeline(inputs["position_ids"], inputs["seqlens_k"], inputs["total_length"], untiled=untiled)
    past = {
        p: Past(inputs[f"past.{p}.key"], inputs[f"past.{p}.value"])
        for node in config.tree.values()
        for p in block_prefixes(node)
    }
    pending = {name: inputs[f"pending.{name}"] for name in config.tree if name != ROOT}
    router = Router(config, weights, time, Tail(b, inputs["last"]), inputs.get("every_node"), pending, past)

    log_probs, routes = run(b, config, weights, inputs["input_ids"], router)
    results = {"log_probs": log_probs, "routes": routes}
    if config.next_tokens:
        vocabulary = np.arange(config.vocab_size) if draft_vocabulary is None else draft_vocabulary
        shape = router.tail.by_batch(b, config.next_tokens)
        drafter = Drafter(config, weights, vocabulary)
        results[DRAFTS] = drafter.tokens(b, inputs[DRAFTING], router.routed, router.order, shape)
    results |= {f"rows.{name}": value for name, value in router.rows.items()}
    results |= {f"head_log_weights.{leaf}": value for leaf, value in router.head_log_weights.items()}
    for prefix, caches in router.present.items():
        results |= {f"present.{prefix}.key": caches.key, f"present.{prefix}.value": caches.value}
    outputs = [named(results[spec.name], spec) for spec in output_specs(config, dtype, cache)]
    return finished(b, list(inputs.values()), outputs, opset)


def finished(b: Builder, inputs: list[ir.Value], outputs: list[ir.Value], opset: int) -> ir.Model:
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=b.nodes,
        initializers=list(b.initializers.values()),
        opset_imports={"": opset, MSFT: 1},
        name="dmpt",
    )
    return ir.Model(graph, ir_version=10 if opset < 23 else 11, producer_name="dmpt-export")


def run(b: Builder, config: DMPTConfig, weights: Weights, ids: ir.Value, router: Router) -> tuple[ir.Value, ir.Value]:
    """Embedding to heads: ids int64 [B, S] -> (log-probs [B, N, V], routes int64 [B, N]); `router` keeps the rest."""
    trunk, *branches = config.tree.values()
    stream = embed(b, weights, ids, router.time.position_ids)
    wanted = None if trunk.children else lambda x, name: router.tail.rows(b, x, name)
    stream, present = segment(b, config, weights, trunk, stream, router.time, router.past, wanted)
    router.present |= present
    if trunk.children is None:
        return _single_leaf(b, config, weights, router, stream)
    router.rows[ROOT] = stream.total(b, f"{trunk.prefix}.output")
    router.fork(b, trunk, router.choose(b, trunk, router.rows[ROOT]))
    for node in branches:
        router.run_if_needed(b, node)
    return router.in_order(b)


def _single_leaf(
    b: Builder, config: DMPTConfig, weights: Weights, router: Router, stream: Stream
) -> tuple[ir.Value, ir.Value]:
    """Without splits there is no routing: norm and heads on the last N rows, which `stream` holds."""
    h, _ = norm_stream(b, weights, stream, "transformer.ln_f", config.layer_norm_epsilon)  # (B, N, E)
    if config.next_tokens:
        router.routed[ROOT] = (b.op("Reshape", h, b.ints(1, -1, config.n_embd), name=f"{ROOT}.for_drafts"), None)
    if len(config.head_allocation[ROOT]) == 1:
        log_probs, _ = leaf_log_probs(b, config, weights, ROOT, h)
    else:
        flat = b.op("Reshape", h, b.ints(1, -1, config.n_embd), name=f"{ROOT}.tail")
        flat_log_probs, log_pi = leaf_log_probs(b, config, weights, ROOT, flat)  # (1, B * N, V), (B * N, H)
        assert log_pi is not None
        router.head_log_weights[ROOT] = log_pi
        log_probs = b.op(
            "Reshape", flat_log_probs, router.tail.by_batch(b, config.vocab_size), name="log_probs.by_batch"
        )
    batch = b.op("Shape", router.time.position_ids, name="routes.batch", start=0, end=1)
    shape = b.op("Concat", batch, router.tail.count, name="routes.shape", axis=0)
    return log_probs, b.op("ConstantOfShape", shape, name="routes.zero", value=ir.tensor([0], dtype=ir.DataType.INT64))


def named(value: ir.Value, spec: Spec) -> ir.Value:
    """Give a result the name, type and shape of its graph output."""
    value.name, value.dtype, value.shape = spec.name, spec.dtype, ir.Shape(spec.shape)
    return value
