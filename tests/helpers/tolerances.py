"""Tolerances between two ways to compute the same log-probs. One table; no test has its own number."""

from __future__ import annotations

from dmpt_export.check.tolerances import TOLERANCES, tolerance
from quant.schemes import SCHEMES

# (dtype, scheme) -> largest absolute difference of a log-probability, in nats
TOLERANCE: dict[tuple[str, str], float] = {
    ("float32", "torch"): 1e-5,  # two implementations in torch, the same weights: only the order of sums differs
    ("float64", "loss"): 1e-10,  # a loss term against plain Python
    ("float32", "loss"): 2e-5,  # a loss or gradient computed by another order of the same sums, logits around 10
}
# Exported against torch: the exporter's own limits. The integer kernels have none here, they are judged by KL.
LINES = TOLERANCES | {("float32", scheme): tolerance("float32", scheme) for scheme in SCHEMES}
TOLERANCE |= {key: line.max_abs for key, line in LINES.items() if line.max_abs is not None}
