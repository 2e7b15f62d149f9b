"""How far an exported model may be from its torch reference: one table, read by the exporter and the tests.

The reference is torch in fp32 with dequantized weights, so quantization loss is not in these numbers; what is, is
rounding and, for integer kernels, the quantization of activations that they do on the fly.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference, over all checked positions."""

    max_abs: float | None  # of a log-probability, in nats; None: judged by KL alone
    kl_mean: float  # KL(torch || ONNX), nats per token
    top1: float  # share of positions whose most probable token is the same
    gate_margin: float  # a route may differ only where the two gate logits are closer than this


# (activation type, scheme) -> Tolerance. The fast-k candidate set may differ at its edge once activations are
# rounded, which moves tail tokens by nats at no cost in KL: hence no max_abs for the integer kernels.
TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("float32", "float"): Tolerance(max_abs=1e-4, kl_mean=1e-6, top1=0.99, gate_margin=1e-4),
    ("float32", "int8"): Tolerance(max_abs=None, kl_mean=5e-3, top1=0.90, gate_margin=0.1),
    ("float32", "int4"): Tolerance(max_abs=None, kl_mean=5e-3, top1=0.90, gate_margin=0.1),
    ("float32", "int8-dynamic"): Tolerance(max_abs=None, kl_mean=5e-2, top1=0.80, gate_margin=0.3),
    ("float16", "float"): Tolerance(max_abs=None, kl_mean=1e-3, top1=0.95, gate_margin=0.05),
    ("float16", "int8"): Tolerance(max_abs=None, kl_mean=1e-3, top1=0.95, gate_margin=0.05),
    ("float16", "int4"): Tolerance(max_abs=None, kl_mean=1e-3, top1=0.95, gate_margin=0.05),
}
