"""How far a quantized model is from its float one, token by token, and the table of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality import gold_nll
from benchmarks.table import markdown

Float = NDArray[np.float32]
REFERENCE = "float32"


@dataclass(frozen=True)
class Divergence:
    """KL(float || quantized) in nats, and what else is told of a model."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    kl_p99: float
    same_top: float  # share of positions with the same most likely token


@dataclass(frozen=True)
class Log:
    """Per token: [n] each."""

    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]


def log(reference: Float, found: Float, targets: NDArray[np.integer], name: str) -> Log:
    """Log-probs [n, V] of both, the tokens that came [n]. Raises ValidationError for what is not finite.

    The KL is summed in float64, both distributions normalised again: rounded log-probs make it negative else.
    """
    nll = gold_nll(found, targets, name)
    r, f = (x.astype(np.float64) for x in (reference, found))
    r, f = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (r, f))
    kl = (np.exp(r) * (r - f)).sum(-1)
    return Log(nll, gold_nll(reference, targets, REFERENCE), kl, reference.argmax(-1) == found.argmax(-1))


def divergence(parts: Sequence[Log]) -> Divergence:
    """Of all windows together."""
    fields = ("nll", "reference_nll", "kl", "same_top")
    nll, plain, kl, same = (np.concatenate([getattr(part, field) for part in parts]) for field in fields)
    return Divergence(
        tokens=len(nll),
        perplexity=math.exp(min(nll.mean(), 700)),
        reference_perplexity=math.exp(min(plain.mean(), 700)),
        mean_kl=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        same_top=float(same.mean()),
    )


def table(lines: Sequence[dict[str, Any]], absent: Sequence[str]) -> str:
    """One Markdown table for each model, ours first, each by size; what could not be measured below."""
    head = ["stored as", "MB on disk", "ONNX MB", "perplexity", "change", "mean KL", "99 % KL", "same top token", "s"]
    out = []
    for model in dict.fromkeys(line["model"] for line in lines):
        latest = {line["name"]: line for line in lines if line["model"] == model}
        rows = sorted(latest.values(), key=lambda line: (line["peer"], -line["onnx_bytes"]))
        first = rows[0]
        about = f"{first['tokens']} tokens of {first['text']}, float perplexity {first['reference_perplexity']:.3f}"
        out.append(f"{model}: {about}\n\n{markdown(head, [_row(line) for line in rows])}")
    return "\n\n".join([*out, *absent]) + "\n"


def _row(line: dict[str, Any]) -> list[str]:
    change = 100 * (line["perplexity"] / line["reference_perplexity"] - 1)
    disk = f"{line['weights_bytes'] / 1e6:.2f}" if "weights_bytes" in line else ""
    return [
        line["name"], disk, f"{line['onnx_bytes'] / 1e6:.2f}", f"{line['perplexity']:.3f}", f"{change:+.2f} %",
        f"{max(line['mean_kl'], 0):.5f}", f"{max(line['kl_p99'], 0):.4f}", f"{100 * line['same_top']:.2f} %",
        f"{line['seconds']:.0f}" if "seconds" in line else "",
    ]  # fmt: skip
