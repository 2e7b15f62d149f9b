"""Embedding and transformer blocks, in the order of training/model.py.

    x ---- ln_1 -- c_attn -- GroupQueryAttention -- c_proj -- + -- ln_2 -- c_fc -- gelu -- c_proj -- + --
     \\_________________________________________________________/ \\_________________________________/

A residual sum and the norm behind it are one SkipLayerNormalization, so a block hands on the two
summands and the next reader adds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dmpt_export.graph.builder import MSFT, Builder
from dmpt_export.graph.linear import Weights, float_weight, gather_rows, linear
from training.config import DMPTConfig, Node


@dataclass(frozen=True)
class Timeline:
    """Graph inputs that say where the new tokens stand."""

    position_ids: ir.Value  # int64 [B, S]
    seqlens_k: ir.Value  # int32 [B], tokens after this run, minus one
    total_length: ir.Value  # int32 [], tokens after this run


@dataclass(frozen=True)
class Stream:
    """The residual stream as two summands; `delta` is None where nothing is to be added yet."""

    x: ir.Value  # [B, R, E]
    delta: ir.Value | None = None

    def total(self, b: Builder, name: str) -> ir.Value:
        return self.x if self.delta is None else b.op("Add", self.x, self.delta, name=name)


def embed(b: Builder, weights: Weights, ids: ir.Value, position_ids: ir.Value) -> Stream:
    """wte[ids] and wpe[positions], left as two summands for the first norm."""
    tokens = gather_rows(b, weights, "transformer.wte.weight", ids, "transformer.wte")
    table = float_weight(b, weights, "transformer.wpe.weight")
    return Stream(tokens, b.op("Gather", table, position_ids, name="transformer.wpe"))


def layer_norm(b: Builder, weights: Weights, x: ir.Value, prefix: str, epsilon: float) -> ir.Value:
    scale, shift = (float_weight(b, weights, f"{prefix}.{part}") for part in ("weight", "bias"))
    return b.op("LayerNormalization", x, scale, shift, name=prefix, axis=-1, epsilon=epsilon)


def norm_stream(b: Builder, weights: Weights, stream: Stream, prefix: str, epsilon: float) -> tuple[ir.Value, Stream]:
    """(normalised rows, the stream with its summands added)."""
    if stream.delta is None:
        return layer_norm(b, weights, stream.x, prefix, epsilon), stream
    scale, shift = (float_weight(b, weights, f"{prefix}.{part}") for part in ("weight", "bias"))
    inputs = (stream.x, stream.delta, scale, shift)
    # The operator's fourth output is the sum; the two between (mean, inverse deviation) are unused.
    normed, _, _, total = b.ops(
        "SkipLayerNormalization", *inputs, name=prefix, outputs=4, unused=(1, 2), domain=MSFT, epsilon=epsilon
    )
    return normed, Stream(total)


def attention(
    b: Builder, config: DMPTConfig, weights: Weights, prefix: str, x: ir.Value, time: Timeline, past: Past
) -> tuple[ir.Value, Past]:
    """Causal attention over cache and new rows; the cache is written in place when its buffers are shared."""
    qkv = linear(b, weights, f"{prefix}.attn.c_attn", x)  # (B, R, 3E), packed as the operator wants it
    inputs: tuple[ir.Value | None, ...] = (qkv, None, None, past.key, past.value, time.seqlens_k, time.total_length)
    quantized: dict[str, Any] = {}
    if f"{prefix}.attn.k_scale" in weights:  # an int8 cache, scaled by channel
        scales = (float_weight(b, weights, f"{prefix}.attn.{part}_scale") for part in "kv")
        inputs += (*[None] * 5, *scales)
        quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    y, key, value = b.ops(
        "GroupQueryAttention",
        *inputs,
        name=f"{prefix}.attn",
        outputs=3,
        domain=MSFT,
        num_heads=config.n_head,
        kv_num_heads=config.n_head,
        **quantized,
    )
    return linear(b, weights, f"{prefix}.attn.c_proj", y), Past(key, value)


def mlp(b: Builder, weights: Weights, prefix: str, x: ir.Value) -> ir.Value:
    y = linear(b, weights, f"{prefix}.mlp.c_fc", x)
    y = b.op("FastGelu", y, name=f"{prefix}.mlp.gelu", domain=MSFT)  # the tanh form
    return linear(b, weights, f"{prefix}.mlp.c_proj", y)


@dataclass(frozen=True)
class Past:
    """Keys and values of one block, each [B, n_head, capacity, head_dim]."""

    key: ir.Value
    value: ir.Value

    @property
    def dtype(self) -> ir.DataType:
        assert self.key.dtype is not None
        return self.key.dtype


def block_prefixes(node: Node) -> list[str]:
    return [f"{node.prefix}.h.{i}" for i in range(node.start, node.stop)]


def segment(
    b: Builder,
    config: DMPTConfig,
    weights: Weights,
    node: Node,
    stream: Stream,
    time: Timeline,
    past: Mapping[str, Past],
) -> tuple[ir.Value, dict[str, Past]]:
    """All blocks of a node: (raw output rows [B, R, E], new caches by block prefix)."""
    present: dict[str, Past] = {}
    epsilon = config.layer_norm_epsilon
    for prefix in block_prefixes(node):
        normed, stream = norm_stream(b, weights, stream, f"{prefix}.ln_1", epsilon)
        delta, present[prefix] = attention(b, config, weights, prefix, normed, time, past[prefix])
        normed, stream = norm_stream(b, weights, Stream(stream.x, delta), f"{prefix}.ln_2", epsilon)
        stream = Stream(stream.x, mlp(b, weights, prefix, normed))
    return stream.total(b, f"{node.prefix}.output"), present
