"""The standard layout: inputs and outputs of optimum, onnxruntime-genai and transformers.js.

    input_ids, attention_mask, position_ids, past_key_values.{i}.key|value -> logits, present.{i}.key|value

Those programs know no paths. So every node runs on every row, each node's blocks are further cache layers, and nothing
is ever pending; the heads still see only the rows routed to their leaf. `logits` are the deployed log-probs.

Every slot of a cache counts as a token, padding too, wherever it lies: attention never sees it, through a bias from the
mask. GroupQueryAttention alone would only know padding behind a text, and not for two steps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.assemble import FLOAT, OPSET, finished, named, run
from dmpt_export.graph.blocks import Past, Timeline, block_prefixes
from dmpt_export.graph.builder import Builder, Spec
from dmpt_export.graph.routing import Router, Tail
from quant.forms.weights import Weights
from training.model.config import DMPTConfig

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
HIDDEN = -1e9  # what padding adds to a score: not infinite, because a row of padding sees nothing else
ALL, KEEP, LAST = "all", "keep", "last"  # rows with logits: every one, num_logits_to_keep, each text's last token
KEEP_INPUT = "num_logits_to_keep"  # int64 [], 0: all


def cache_layers(config: DMPTConfig) -> list[str]:
    """Block prefixes in the order of cache layers: the trunk's, then each further node's."""
    return [prefix for node in config.tree.values() for prefix in block_prefixes(node)]


def cache_specs(config: DMPTConfig, label: str, length: str) -> list[Spec]:
    """Caches of all layers: inputs (`past_key_values`) or outputs (`present`)."""
    shape: tuple[int | str, ...] = ("batch_size", config.n_head, length, config.n_embd // config.n_head)
    layers = range(len(cache_layers(config)))
    return [Spec(f"{label}.{i}.{part}", FLOAT, shape) for i in layers for part in ("key", "value")]


def input_specs(config: DMPTConfig, rows: str) -> list[Spec]:
    """Inputs in order; rows: ALL, KEEP or LAST."""
    tokens, total = ("batch_size", "sequence_length"), ("batch_size", "total_sequence_length")
    return [
        Spec("input_ids", INT64, tokens),
        Spec("attention_mask", INT64, total),
        Spec("position_ids", INT64, tokens),
        *([Spec(KEEP_INPUT, INT64, ())] if rows == KEEP else []),
        *cache_specs(config, "past_key_values", "past_sequence_length"),
    ]


def output_specs(config: DMPTConfig, rows: str) -> list[Spec]:
    """Outputs in order."""
    length: int | str = {ALL: "sequence_length", KEEP: "num_logits"}.get(rows, 1)
    logits = Spec("logits", FLOAT, ("batch_size", length, config.vocab_size))
    return [logits, *cache_specs(config, "present", "total_sequence_length")]


def build_standard(
    config: DMPTConfig, weights: Weights, rows: str = ALL, opset: int = OPSET, untiled: bool = False
) -> ir.Model:
    """The graph of one model in the standard layout, with float32 activations and caches. untiled: see Timeline.

    The routes are computed but are no output: the check adds the value `routes`. Graphs that differ only in `rows` have
    the same initializers but for small constants.
    """
    b = Builder(FLOAT)
    inputs = {spec.name: spec.value() for spec in input_specs(config, rows)}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    new = b.op("Shape", ids, name="rows.new", start=1, end=2)  # (1)
    time = replace(timeline(b, mask, new, inputs["position_ids"]), untiled=untiled)
    layers = cache_layers(config)
    past = {
        prefix: Past(inputs[f"past_key_values.{i}.key"], inputs[f"past_key_values.{i}.value"])
        for i, prefix in enumerate(layers)
    }
    tail = LastTokens(b, mask, new) if rows == LAST else Tail(b, wanted(b, new, inputs.get(KEEP_INPUT)))
    router = Router(config, weights, time, tail, None, {}, past)
    log_probs, routes = run(b, config, weights, ids, router)
    routes.name = "routes"
    results = {"logits": log_probs}
    for i, prefix in enumerate(layers):
        caches = router.present[prefix]
        results |= {f"present.{i}.key": caches.key, f"present.{i}.value": caches.value}
    outputs = [named(results[spec.name], spec) for spec in output_specs(config, rows)]
    return finished(b, list(inputs.values()), outputs, opset)


def timeline(b: Builder, mask: ir.Value, new: ir.Value, position_ids: ir.Value) -> Timeline:
    """mask int64 [B, T], new int64 [1]: S."""
    batch = b.op("Shape", mask, name="mask.batch", start=0, end=1)
    total = b.op("Shape", mask, name="mask.total", start=1, end=2)  # (1)
    last = b.op("Sub", total, b.ints(1), name="seqlens_k.last")
    seqlens = b.op("Cast", b.op("Expand", last, batch, name="seqlens_k.int64"), name="seqlens_k", to=int(INT32))
    length = b.op("Reshape", total, b.ints(), name="total_length.int64")
    length = b.op("Cast", length, name="total_length", to=int(INT32))
    seen = b.op("Cast", mask, name="mask.float", to=int(FLOAT))
    hidden = b.weight("const.hidden", np.array(HIDDEN, np.float32))
    bias = b.op("Mul", b.op("Sub", b.weight("const.one", np.array(1, np.float32)), seen, name="mask.hidden"), hidden,
                name="mask.bias")  # fmt: skip
    bias = b.op("Unsqueeze", bias, b.ints(1, 2), name="mask.bias.rows")  # (B, 1, 1, T)
    shape = b.op("Concat", batch, b.ints(1), new, total, name="mask.bias.shape", axis=0)
    return Timeline(position_ids, seqlens, length, b.op("Expand", bias, shape, name="attention_bias"))


def wanted(b: Builder, new: ir.Value, keep: ir.Value | None) -> ir.Value:
    """How many last rows have logits, int64 []: all the new ones, or `keep` if that is fewer and not 0."""
    count = b.op("Reshape", new, b.ints(), name="rows.count")
    if keep is None:
        return count
    fewer = b.op("Min", keep, count, name="rows.kept")
    every = b.op("Equal", keep, b.ints(0, scalar=True), name="rows.every")
    return b.op("Where", every, count, fewer, name="rows.wanted")


class LastTokens(Tail):
    """The last row of each text that is no padding: padding may lie behind it."""

    def __init__(self, b: Builder, mask: ir.Value, new: ir.Value) -> None:
        self.count = b.ints(1)
        end = b.ints(np.iinfo(np.int64).max)
        start = b.op("Neg", new, name="last.start")
        mask = b.op("Slice", mask, start, end, b.ints(1), name="last.mask")  # (B, S)
        mask = b.op("Cast", mask, name="last.mask.int32", to=int(INT32))
        self.index = b.op("ArgMax", mask, name="last.index", axis=1, keepdims=1, select_last_index=1)  # (B, 1)

    def rows(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        index = b.op("Unsqueeze", self.index, b.ints(2), name=f"{name}.last.index")
        return b.op("GatherND", x, index, name=f"{name}.last", batch_dims=1)

    def places(self, b: Builder, pairs: ir.Value, name: str) -> ir.Value:
        text = b.op("Gather", pairs, b.ints(0), name=f"{name}.text", axis=1)  # (n, 1)
        index = b.op("GatherND", self.index, text, name=f"{name}.text.last")  # (n, 1)
        both = b.op("Concat", text, index, name=f"{name}.text.pairs", axis=1)
        return b.op("Unsqueeze", both, b.ints(0), name=f"{name}.text.places")
