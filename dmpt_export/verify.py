"""Run an exported folder with the runtime that ships, and hold it against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dmpt_export.tolerances import TOLERANCES, Tolerance
from training.config import DMPTConfig
from training.errors import ValidationError

CHECKED_TOKENS = 96  # enough for switches, catch-up and a cache that grew, yet under a second on small models
SEED = 20250


def verify_folder(folder: Path, source: Path, config: DMPTConfig, scheme: str) -> dict[str, Any]:
    """Compare whole-sequence scoring and prefill-then-step decoding with torch; return what was measured.

    Raises ValidationError (exit code 4) saying what differs, by how much and where.
    """
    import runtime

    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, min(CHECKED_TOKENS, config.n_positions))
    want, routes, margins = torch_reference(source, config, ids)
    with runtime.load(folder) as model:
        tolerance = TOLERANCES[(model.manifest.raw["activation_dtype"], scheme)]
        whole = model.score(ids.tolist())
        stepped = decode_stepwise(model, ids.tolist())
    first = len(ids) - len(stepped[0])
    results = {
        "whole": compare(want, routes, margins, *whole, tolerance, 0, "scored as a whole"),
        "stepwise": compare(want[first:], routes[first:], margins[first:], *stepped, tolerance, first, "decoded stepwise"),
    }
    return {"tokens": len(ids), "seed": SEED, "tolerance": vars(tolerance), **results}


def torch_reference(source: Path, config: DMPTConfig, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One-shot torch evaluation with dequantized weights: log-probs [S, V], leaf indices [S], gate margins [S]."""
    import torch

    from quant.checkpoint import dequantized_model

    model = dequantized_model(source)
    model.config.head_topk = config.head_topk
    with torch.inference_mode():
        batch = torch.from_numpy(ids)[None]
        gates = model.hidden(batch).gates
        log_probs = model.log_probs(batch, fast_k=config.fast_k)[0].numpy()
        if not gates:
            return log_probs, np.zeros(len(ids), np.int64), np.full(len(ids), np.inf)
        routes = model.routes(gates)[0].numpy()
        margins = torch.stack([(g[..., 1] - g[..., 0]).abs()[0] for g in gates.values()]).amin(0).numpy()
    return log_probs, routes, margins


def decode_stepwise(model: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A prompt of a third, then single tokens: (log-probs, routes) from the prompt's last position on."""
    sequence, prompt = model.sequence(), max(1, len(ids) // 3)
    rows = [sequence.feed(ids[:prompt], last=1)] + [sequence.feed([token], last=1) for token in ids[prompt:]]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def compare(
    want: np.ndarray,
    want_routes: np.ndarray,
    margins: np.ndarray,
    got: np.ndarray,
    got_routes: np.ndarray,
    tolerance: Tolerance,
    first: int,
    how: str,
) -> dict[str, Any]:
    """Routes exactly first, then log-probs [S, V]; `first` is the position of row 0, for messages."""
    if not np.isfinite(got).all():
        t, v = np.argwhere(~np.isfinite(got))[0]
        raise ValidationError(f"{how}: log-prob of token {v} at position {first + t} is {got[t, v]}")
    differs = want_routes != got_routes
    if (differs & (margins >= tolerance.gate_margin)).any():
        t = int(np.argmax(differs & (margins >= tolerance.gate_margin)))
        raise ValidationError(
            f"{how}: position {first + t} takes path {got_routes[t]} where torch takes {want_routes[t]} "
            f"(gate margin {margins[t]:.3g}, allowed to differ under {tolerance.gate_margin:g})"
        )
    same = ~differs  # a near-tie that went the other way is another distribution, not an error
    difference = np.abs(want - got).max(-1, where=same[:, None], initial=0.0)
    kl = (np.exp(want) * (want - got)).sum(-1)[same]
    top1 = float((want.argmax(-1) == got.argmax(-1))[same].mean())
    worst = int(difference.argmax())
    measured = {
        "max_abs_diff": float(difference[worst]),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": top1,
        "routes_equal": bool(same.all()),
        "near_ties": int(differs.sum()),
    }
    limits = [
        ("largest log-prob difference", measured["max_abs_diff"], tolerance.max_abs),
        ("mean KL", measured["kl_mean"], tolerance.kl_mean),
        ("share of other top tokens", 1 - top1, 1 - tolerance.top1),
    ]
    for what, value, limit in limits:
        if limit is not None and value > limit:
            raise ValidationError(
                f"{how}: {what} against torch is {value:.3g}, allowed {limit:.3g}; "
                f"worst at position {first + worst} on path {want_routes[worst]}"
            )
    return measured
