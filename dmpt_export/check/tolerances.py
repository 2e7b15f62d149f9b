"""Tolerances of an exported model against its torch reference: one table, used by the exporter and the tests.

The reference is torch in float32 with dequantized weights, so these numbers do not include quantization loss. They
include rounding and, for integer kernels, the quantization of activations at run time.

Integer kernels differ between processors: Arm's int4 products with dot-product instructions round scales further (sums
0.05 to 0.4 % smaller than x86's), and some x86 kernels before AVX-512 add in another order. The same lines hold
between emulated processors and an AVX-512 machine (benchmarks.evidence.processors, RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Collection

from quant.schemes import SCHEMES, Rounding
from quant.schemes.low_rank import DELTAS
from runtime.proof import Tolerance

KV_INT8 = ("float32", "int8 KV cache")  # with any weights
EXACT = ("float32", "float")  # float kernels, whatever the weights are stored in

SAME = Tolerance(max_abs=1e-4, kl_mean=1e-6, top1=0.99, gate_margin=1e-4)  # float kernels
ROUNDED = Tolerance(max_abs=None, kl_mean=0.03, top1=0.80, gate_margin=0.5)  # kernels that round activations, and fp16
TWICE = Tolerance(max_abs=None, kl_mean=0.06, top1=0.80, gate_margin=0.5)  # rounding coarser still

# The lines of integer kernels are about three times the worst of 36 random models (three trees, three seeds). Random
# models are the hard case: heads that disagree and 16 candidates of 97, where rounding swaps a candidate at the edge of
# the set and moves tail tokens by nats; hence no max_abs.
BY_ROUNDING = {Rounding.NONE: SAME, Rounding.ACTIVATIONS: ROUNDED, Rounding.COARSE: TWICE}
# (activation type, name that is not in quant.schemes) -> Tolerance
TOLERANCES: dict[tuple[str, str], Tolerance] = {
    EXACT: SAME,
    ("float16", "float"): ROUNDED,
    KV_INT8: TWICE,
    **{(activations, delta): ROUNDED for activations in ("float32", "float16") for delta in DELTAS},
}


def loosest(activations: str, schemes: Collection[str]) -> Tolerance:
    """The line for weights stored in several schemes, some perhaps used by only a few tensors.

    It is the line of the scheme that allows the largest KL; without any scheme, that of float.
    """
    return max((tolerance(activations, scheme) for scheme in schemes or ["float"]), key=lambda line: line.kl_mean)


def tolerance(activations: str, scheme: str) -> Tolerance:
    """The line of one scheme; fp16 kernels round with any scheme."""
    if scheme in SCHEMES:
        return BY_ROUNDING[SCHEMES[scheme].rounding] if activations == "float32" else ROUNDED
    return TOLERANCES[activations, scheme]
