"""Embedding and transformer blocks, in the order of training/model/dmpt.py.

    x ---- ln_1 -- c_attn -- GroupQueryAttention -- c_proj -- + -- ln_2 -- c_fc -- gelu -- c_proj -- + --
     \\_________________________________________________________/ \\_________________________________/

A block returns its residual sum as two summands: on a GPU the next reader adds and normalises them in one
SkipLayerNormalization. On the CPU that kernel takes five times as long as an Add and a LayerNormalization.

In a leaf's last block every row needs keys and values, but rows without a requested output end after its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dmpt_export.graph.builder import MSFT, Builder
from dmpt_export.graph.linear import float_weight, gather_rows, linear
from quant.forms.weights import Weights
from training.model.config import DMPTConfig
from training.model.shape import ACTIVATIONS, Node

AFTER_SOFTMAX = 2  # GroupQueryAttention's qk_output


@dataclass(frozen=True)
class Timeline:
    """Graph inputs with the positions of the new tokens."""

    position_ids: ir.Value  # int64 [B, S]
    seqlens_k: ir.Value  # int32 [B], tokens after this run, minus one
    total_length: ir.Value  # int32 [], tokens after this run
    bias: ir.Value | None = None  # float [B, 1, S, tokens after this run], added to attention's scores: hides padding
    untiled: bool = False  # attention for WebAssembly, where tiles of many rows take eight times as long


@dataclass(frozen=True)
class Stream:
    """The residual stream as two summands; `delta` is None if there is nothing to add yet."""

    x: ir.Value  # [B, R, E]
    delta: ir.Value | None = None

    def total(self, b: Builder, name: str) -> ir.Value:
        return self.x if self.delta is None else b.op("Add", self.x, self.delta, name=name)


def embed(b: Builder, weights: Weights, ids: ir.Value, position_ids: ir.Value) -> Stream:
    """wte[ids] and wpe[positions] as two summands for the first norm."""
    tokens = gather_rows(b, weights, "transformer.wte.weight", ids, "transformer.wte")
    table = float_weight(b, weights, "transformer.wpe.weight")
    return Stream(tokens, b.op("Gather", table, position_ids, name="transformer.wpe"))


def norm_stream(b: Builder, weights: Weights, stream: Stream, prefix: str, epsilon: float) -> tuple[ir.Value, Stream]:
    """(normalised rows, the stream with its summands added)."""
    scale, shift = (float_weight(b, weights, f"{prefix}.{part}") for part in ("weight", "bias"))
    if stream.delta is None or b.dtype == ir.DataType.FLOAT:
        total = stream.total(b, f"{prefix}.input")
        normed = b.op("LayerNormalization", total, scale, shift, name=prefix, axis=-1, epsilon=epsilon)
        return normed, Stream(total)
    inputs = (stream.x, stream.delta, scale, shift)
    # The operator's fourth output is the sum; the two between (mean, inverse deviation) are unused.
    normed, _, _, total = b.ops(
        "SkipLayerNormalization", *inputs, name=prefix, outputs=4, unused=(1, 2), domain=MSFT, epsilon=epsilon
    )
    return normed, Stream(total)


def attention(
    b: Builder, config: DMPTConfig, weights: Weights, prefix: str, x: ir.Value, time: Timeline, past: Past
) -> tuple[ir.Value, Past]:
    """Causal attention over cache and new rows, before c_proj; a cache with shared buffers is written in place."""
    qkv = linear(b, weights, f"{prefix}.attn.c_attn", x)  # (B, R, 3E), packed as the operator expects
    inputs: tuple[ir.Value | None, ...] = (qkv, None, None, past.key, past.value, time.seqlens_k, time.total_length)
    if time.bias is not None:
        inputs += (None, None, None, time.bias)
    how: dict[str, Any] = {}
    if time.untiled:  # the tiled kernel cannot give its probabilities
        how = {"qk_output": AFTER_SOFTMAX}
    if f"{prefix}.attn.k_scale" in weights:  # an int8 cache, scaled by channel
        scales = (float_weight(b, weights, f"{prefix}.attn.{part}_scale") for part in "kv")
        inputs += (*[None] * 5, *scales)
        how |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    y, key, value, *_ = b.ops(
        "GroupQueryAttention",
        *inputs,
        name=f"{prefix}.attn",
        outputs=4 if time.untiled else 3,
        domain=MSFT,
        num_heads=config.n_head,
        kv_num_heads=config.n_head,
        **how,
    )
    return y, Past(key, value)


def mlp(b: Builder, config: DMPTConfig, weights: Weights, prefix: str, x: ir.Value) -> ir.Value:
    y = linear(b, weights, f"{prefix}.mlp.c_fc", x)
    tanh = ACTIVATIONS[config.activation_function] == "tanh"
    kernel, domain = ("FastGelu", MSFT) if tanh else ("Gelu", "")
    y = b.op(kernel, y, name=f"{prefix}.mlp.gelu", domain=domain)
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
    wanted: Callable[[ir.Value, str], ir.Value] | None = None,
) -> tuple[Stream, dict[str, Past]]:
    """All blocks of a node: (raw output rows [B, R, E] as two summands, new caches by block prefix).

    `wanted`, given in a leaf, picks the requested rows from rows [B, R, E]; the output has only these.
    """
    present: dict[str, Past] = {}
    epsilon = config.layer_norm_epsilon
    prefixes = block_prefixes(node)
    for prefix in prefixes:
        normed, stream = norm_stream(b, weights, stream, f"{prefix}.ln_1", epsilon)
        y, present[prefix] = attention(b, config, weights, prefix, normed, time, past[prefix])
        if wanted is not None and prefix == prefixes[-1]:
            y, stream = wanted(y, f"{prefix}.attn"), Stream(wanted(stream.x, prefix))
        delta = linear(b, weights, f"{prefix}.attn.c_proj", y)
        normed, stream = norm_stream(b, weights, Stream(stream.x, delta), f"{prefix}.ln_2", epsilon)
        stream = Stream(stream.x, mlp(b, config, weights, prefix, normed))
    return stream, present
