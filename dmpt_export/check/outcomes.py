"""What a model gave at consecutive positions, and how far that is from torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.quality.divergence import kl_divergence
from dmpt_export.check.drafts import Drafts
from runtime.proof import TIE, Tolerance
from training.errors import ValidationError


@dataclass(frozen=True)
class Outcome:
    """A model's outputs at consecutive positions from `first`."""

    log_probs: np.ndarray  # float32 [S, V]
    routes: np.ndarray  # int64 [S], leaf indices
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Reference(Outcome):
    """torch's outcome, and how close each position was to a different route or other candidates."""

    edges: np.ndarray  # bool [S]: the choice of candidates is within EDGE of another
    margins: np.ndarray  # [S]: logit gap of the closest gate over the mean gap; infinite where no gate chose
    turns: list[tuple[str, int]]  # (split node, 0 left or 1 right): the forced way of every token there
    drafts: Drafts  # of the same positions

    def part(self, first: int, stop: int | None = None) -> Reference:
        """Positions from `first` up to `stop`."""
        rows = slice(first, stop)
        own = {name: getattr(self, name)[rows] for name in ("log_probs", "routes", "edges", "margins")}
        return replace(self, **own, first=first)


def compare(want: Reference, got: Outcome, tolerance: Tolerance, how: str) -> dict[str, Any]:
    """Compare `got` with torch, routes first; returns the differences or raises ValidationError."""
    if not np.isfinite(got.log_probs).all():
        t, v = np.argwhere(~np.isfinite(got.log_probs))[0]
        raise ValidationError(f"{how}: log-prob of token {v} at position {got.first + t} is {got.log_probs[t, v]}")
    differs = want.routes != got.routes
    wrong = differs & (want.margins >= tolerance.gate_margin)
    if wrong.any():
        t = int(wrong.argmax())
        raise ValidationError(
            f"{how}: position {got.first + t} takes path {got.routes[t]}, torch takes {want.routes[t]} "
            f"(gate logits differ by {want.margins[t]:.2g} of the mean gap; up to {tolerance.gate_margin:g} is a tie)"
        )
    # A near-tie on the other path, or with another candidate, has a different distribution, which is not an error.
    same = ~differs & ~want.edges
    if not same.any():  # every position is at an edge: rounding cannot be told from a fault
        same = ~differs
    ties = {"near_ties": int(differs.sum()), "candidate_ties": int(want.edges.sum())}
    measured = {**distances(want.log_probs[same], got.log_probs[same]), **ties}
    limits = [
        ("largest log-prob difference", measured["max_abs_diff"], tolerance.max_abs),
        ("mean KL", measured["kl_mean"], tolerance.kl_mean),
        ("share of different top tokens", 1 - measured["top1_agreement"], 1 - tolerance.top1),
    ]
    for what, value, limit in limits:
        if limit is not None and value > limit:
            worst = got.first + int(np.flatnonzero(same)[np.abs(want.log_probs - got.log_probs)[same].max(-1).argmax()])
            raise ValidationError(
                f"{how}: {what} against torch is {value:.3g}, allowed {limit:.3g}; worst at position {worst}, "
                f"path {want.routes[worst - got.first]}"
            )
    return {**measured, "routes_equal": not bool(differs.any())}


def distances(want: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """How far two sets of log-probs [S, V] are apart; KL(want || got) in nats per position."""
    kl = kl_divergence(want, got)
    preferred = np.take_along_axis(want, got.argmax(-1)[:, None], axis=-1)[:, 0]
    return {
        "max_abs_diff": float(np.abs(want - got).max()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float((want.max(-1) - preferred <= TIE).mean()),
    }
