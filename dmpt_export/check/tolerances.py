"""How far an exported model may be from its torch reference: one table, read by the exporter and the tests.

The reference is torch in fp32 with dequantized weights, so quantization loss is not in these numbers; what is, is
rounding and, for integer kernels, the quantization of activations that they do on the fly.

Integer kernels differ between processors: Arm's int4 products with dot-product instructions round scales further (sums
0.05 to 0.4 % smaller than x86's), and some x86 kernels before AVX-512 add in another order. The same lines hold there
between emulated processors and an AVX-512 machine (benchmarks.evidence.processors, RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from quant.schemes import SCHEMES, Rounding
from quant.schemes.low_rank import DELTAS


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference, over all checked positions."""

    max_abs: float | None  # of a log-probability, in nats; None: judged by KL alone
    kl_mean: float  # KL(torch || ONNX), nats per token
    top1: float  # share of positions whose most probable token is the same or a tie
    gate_margin: float  # a route may differ only where the gate's logits are closer than this share of their usual gap


KV_INT8 = ("float32", "int8 KV cache")  # with any weights
EXACT = ("float32", "float")  # float kernels, whatever the weights are stored in

SAME = Tolerance(max_abs=1e-4, kl_mean=1e-6, top1=0.99, gate_margin=1e-4)  # float kernels
ROUNDED = Tolerance(max_abs=None, kl_mean=0.03, top1=0.80, gate_margin=0.5)  # kernels that round activations, and fp16
TWICE = Tolerance(max_abs=None, kl_mean=0.06, top1=0.80, gate_margin=0.5)  # rounding coarser still

# The lines of integer kernels are about three times the worst of 36 random models (three trees, three seeds). Those are
# the hard case: heads that agree on nothing and 16 candidates of 97, where rounding swaps a candidate at the edge of
# the set and moves tail tokens by nats; hence no max_abs.
BY_ROUNDING = {Rounding.NONE: SAME, Rounding.ACTIVATIONS: ROUNDED, Rounding.COARSE: TWICE}
# (activation type, what is not a scheme of quant.schemes) -> Tolerance
TOLERANCES: dict[tuple[str, str], Tolerance] = {
    EXACT: SAME,
    ("float16", "float"): ROUNDED,
    KV_INT8: TWICE,
    **{(activations, delta): ROUNDED for activations in ("float32", "float16") for delta in DELTAS},
}


def loosest(activations: str, schemes: Collection[str]) -> Tolerance:
    """The line for weights stored in several schemes, one of which may be that of a few tensors only.

    No lines are mixed: among those of the schemes, float where there are none, the one that allows the largest KL.
    """
    return max((tolerance(activations, scheme) for scheme in schemes or ["float"]), key=lambda line: line.kl_mean)


def tolerance(activations: str, scheme: str) -> Tolerance:
    """The line of one scheme; fp16 kernels round whatever the scheme."""
    if scheme in SCHEMES:
        return BY_ROUNDING[SCHEMES[scheme].rounding] if activations == "float32" else ROUNDED
    return TOLERANCES[activations, scheme]
