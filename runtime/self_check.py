"""Run an export's proof on this device: are routes and log-probs what torch gave when the model was exported?

Three ways to run it, because other kernels serve one row and many: the whole text at once, token by token after a
prompt, and two texts together. Routes are compared first, log-probs after.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch
from runtime.errors import CheckError, SetupError
from runtime.processor import features
from runtime.proof import TIE, Floats, Ints, Proof
from runtime.sequence import Sequence
from runtime.session import Engine

WHOLE, STEPS, TOGETHER = "text at once", "token by token", "texts together"
UNSUMMED = 0.01  # how far a row of probabilities may be from 1 in sum
NOTHING = 1e-30  # the probability of no ids


@dataclass(frozen=True)
class Part:
    """How far one way to run the proof is from it. Figures are None where nothing could be compared."""

    name: str
    positions: int = 0  # compared
    near_ties: int = 0  # took the other path of a gate that was undecided; their log-probs are not compared
    max_abs_diff: float | None = None  # of a log-prob, in nats
    kl_mean: float | None = None  # nats per token: see distances()
    top1_agreement: float | None = None  # share of positions
    failure: str | None = None  # what is beyond the limits
    skipped: str | None = None  # why it was not run


@dataclass(frozen=True)
class SelfCheck:
    """The outcome, and what it was found with."""

    parts: list[Part]
    proof: Proof
    onnxruntime: str
    processor: str
    features: list[str]  # of the processor, as far as they select kernels
    threads: int

    @property
    def failure(self) -> str | None:
        """The first thing that is wrong; None where this device computes what the export must give."""
        return next((f"{part.name}: {part.failure}" for part in self.parts if part.failure is not None), None)

    def require(self) -> None:
        """Raise CheckError (exit code 4) unless all passed."""
        if self.failure is not None:
            raise CheckError(
                f"this device computes something different from the export ({self.failure}), with onnxruntime "
                f"{self.onnxruntime} on {self.processor} ({' '.join(self.features) or 'features unknown'}): install "
                "another version of onnxruntime, or export other weights (float ones need no integer kernels)"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.failure is None,
            "failure": self.failure,
            "parts": {part.name: {k: v for k, v in asdict(part).items() if k != "name"} for part in self.parts},
            "tolerance": asdict(self.proof.tolerance),
            "positions": len(self.proof.ids),
            "onnxruntime": self.onnxruntime,
            "processor": self.processor,
            "features": self.features,
            "threads": self.threads,
        }


def run_proof(engine: Engine, proof: Proof, threads: int) -> SelfCheck:
    """Run the proof in every way that this model allows."""
    parts = [whole(engine, proof), steps(engine, proof), together(engine, proof)]
    machine = platform.machine() or "unknown"
    return SelfCheck(parts, proof, engine.onnxruntime_version, machine, features(), threads)


def whole(engine: Engine, proof: Proof) -> Part:
    size = len(proof.ids)
    return compared(WHOLE, proof, np.arange(size), *Sequence(engine, size).feed(proof.ids, last=size))


def steps(engine: Engine, proof: Proof) -> Part:
    sequence, rest = Sequence(engine, len(proof.ids)), proof.ids[proof.prompt :]
    rows = [sequence.feed(proof.ids[: proof.prompt]), *(sequence.feed([token]) for token in rest)]
    log_probs, routes = (np.concatenate(part) for part in zip(*rows, strict=True))
    return compared(STEPS, proof, np.arange(proof.prompt - 1, len(proof.ids)), log_probs, routes)


def together(engine: Engine, proof: Proof) -> Part:
    """Two beginnings of the proof's text, of different lengths, as the rows of a batch."""
    if engine.manifest.rounds_rows_together:
        return Part(TOGETHER, skipped="the runtime takes texts of this model one by one")
    ids, size = proof.ids, len(proof.ids)
    starts = np.array([(size + 3) // 4, (size + 1) // 2])
    try:
        batch = Batch(engine, 2, size)
    except SetupError as error:
        return Part(TOGETHER, skipped=str(error))
    rows = [batch.feed([ids[:start] for start in starts])]
    places = [starts - 1]
    for ahead in range(size - int(starts.max())):
        rows.append(batch.step(ids[starts + ahead]))
        places.append(starts + ahead)
    log_probs, routes = (np.concatenate(part) for part in zip(*rows, strict=True))
    return compared(TOGETHER, proof, np.concatenate(places), log_probs, routes)


def compared(name: str, proof: Proof, at: Ints, log_probs: NDArray[np.float32], routes: Ints) -> Part:
    """Compare log-probs [N, vocab] and routes [N] with the proof's positions `at` [N]."""
    if not np.isfinite(log_probs).all():
        row, token = np.argwhere(~np.isfinite(log_probs))[0]
        return Part(name, failure=f"log-prob of token {token} at position {at[row]} is {log_probs[row, token]}")
    sums = np.exp(log_probs.astype(np.float64)).sum(1)
    if (off := np.abs(sums - 1) > UNSUMMED).any():  # KL means nothing then, and may even be negative
        row = int(off.argmax())
        return Part(name, failure=f"the probabilities at position {at[row]} sum to {sums[row]:.4g}")
    tolerance = proof.tolerance
    differs = routes != proof.routes[at]
    wrong = differs & (proof.margins[at] >= tolerance.gate_margin)
    # A near-tie on the other path, or with another candidate, has a different distribution, which is no error.
    same = ~differs & ~proof.ties[at]
    same = same if same.any() else ~differs
    ties = int((differs & ~wrong).sum())
    if not same.any():
        return Part(name, near_ties=ties, failure=f"none of {len(at)} positions takes the path that it must take")
    largest, kl, top1 = distances(proof, at[same], log_probs[same])
    failure = None
    if wrong.any():
        row = int(wrong.argmax())
        failure = (
            f"{wrong.sum()} of {len(at)} positions take another path, first position {at[row]} (path {routes[row]} "
            f"instead of {proof.routes[at[row]]}; its gate is decided by {proof.margins[at[row]]:.2g} of the mean gap)"
        )
    elif tolerance.max_abs is not None and not largest <= tolerance.max_abs:
        failure = f"the largest log-prob difference is {largest:.3g}, allowed {tolerance.max_abs:.3g}"
    elif not kl <= tolerance.kl_mean:
        failure = f"the mean KL is at least {kl:.3g}, allowed {tolerance.kl_mean:.3g}"
    elif not top1 >= tolerance.top1:
        failure = f"{1 - top1:.0%} of the positions have another likeliest token, allowed {1 - tolerance.top1:.0%}"
    return Part(name, int(same.sum()), ties, largest, kl, top1, failure)


def distances(proof: Proof, at: Ints, log_probs: NDArray[np.float32]) -> tuple[float, float, float]:
    """(largest difference of a log-prob, mean KL(proof || log_probs), share of equal likeliest tokens).

    The proof knows the likeliest ids, some others, and the rest as one. KL of distributions that are merged like this
    is never more than that of the whole ones, so a device within the limit is never refused for what was left out.
    """
    top, rows = proof.top_ids[at], np.arange(len(at))[:, None]
    others = np.broadcast_to(proof.other_ids, (len(at), len(proof.other_ids)))
    ids = np.concatenate([top, others], axis=1)
    want = np.concatenate([proof.top_log_probs[at], proof.other_log_probs[at]], axis=1)
    got = log_probs[rows, ids].astype(np.float64)
    counted = np.ones(ids.shape, bool)  # an id among the others that is also one of the likeliest counts once
    counted[:, top.shape[1] :] = ~(others[:, :, None] == top[:, None]).any(-1)
    rest = rest_of(log_probs, ids)
    kl = (np.exp(want) * (want - got) * counted).sum(1) + np.exp(proof.rest[at]) * (proof.rest[at] - rest)
    likeliest = log_probs.argmax(1)[:, None]
    gaps = proof.top_log_probs[at][:, :1] - proof.top_log_probs[at]
    close = (top == likeliest) & (gaps <= max(TIE, proof.tolerance.max_abs or 0))
    return float(np.abs(want - got).max()), max(float(kl.mean()), 0.0), float(close.any(1).mean())


def rest_of(log_probs: NDArray[np.float32], ids: Ints) -> Floats:
    """Log of the probability of all tokens of each row [N, vocab] but `ids` [N, n]: [N]."""
    p = np.exp(log_probs.astype(np.float64))
    p[np.arange(len(p))[:, None], ids] = 0
    return np.asarray(np.log(p.sum(1).clip(min=NOTHING)))
