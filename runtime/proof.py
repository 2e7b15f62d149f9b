"""Read dmpt_proof.json: some token ids, and what the model must give for them on any device.

The export writes it from torch's results (dmpt_export.check.proof). Rows of the vocabulary are reduced: the likeliest
ids of each position, some other ids that are the same everywhere, and the probability of all the rest together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ModelError
from runtime.manifest import Manifest
from runtime.manifest_file import PROOF_NAME
from runtime.schema import COUNT, ID, NAME, NUMBER, NUMBER_OR_NULL, OBJECT_OR_NULL, faults

FORMAT, FORMAT_VERSION = "dmpt-proof", 1
MOST_BYTES = 1 << 20
TIE = 1e-6  # nats: tokens closer than float32 can resolve both count as the likeliest
TOLERANCE = {"max_abs": NUMBER_OR_NULL, "kl_mean": NUMBER, "top1": NUMBER, "gate_margin": NUMBER}
SCHEMA: dict[str, Any] = {
    "ids": [ID],
    "prompt": COUNT,
    "tolerance": TOLERANCE,
    "routes": [ID],
    "margins": [NUMBER_OR_NULL],
    "candidate_ties": [ID],
    "top_ids": [[ID]],
    "top_log_probs": [[NUMBER]],
    "other_ids": [ID],
    "other_log_probs": [[NUMBER]],
    "rest": [NUMBER],
    "exported": OBJECT_OR_NULL,
}
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference over all checked positions (docs/design.md, Tolerances)."""

    max_abs: float | None  # of a log-prob, in nats; None: only KL is checked
    kl_mean: float  # KL(torch || ONNX), nats per token
    top1: float  # share of positions whose top token is the same or a tie
    gate_margin: float  # a route may only differ where the gap of the gate's logits is below this share of the mean gap


@dataclass(frozen=True)
class Proof:
    """S positions, K likeliest ids of each, R other ids."""

    ids: Ints  # [S], fed from the beginning of a text
    prompt: int  # how many of them are fed at once before decoding continues one by one
    tolerance: Tolerance
    routes: Ints  # [S], leaf indices
    margins: Floats  # [S]: gap of the closest gate's logits over the mean gap; infinite where no gate chose
    ties: NDArray[np.bool_]  # [S]: rounding decides which token is the last candidate
    top_ids: Ints  # [S, K], likeliest first
    top_log_probs: Floats  # [S, K]
    other_ids: Ints  # [R]
    other_log_probs: Floats  # [S, R]
    rest: Floats  # [S]: log of the probability of all ids that are in neither
    exported: dict[str, Any] | None  # the same check where the export was made


def read_proof(folder: Path, manifest: Manifest) -> Proof:
    """The proof of an exported folder. Raises ModelError where there is none, or a damaged one."""
    path = folder / PROOF_NAME
    if PROOF_NAME not in {entry.name for entry in manifest.files}:
        raise ModelError(
            f"{folder} has no {PROOF_NAME}: it was exported by an earlier dmpt-export, or with --no-verify; export the "
            "checkpoint again to check it on a device"
        )
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelError(f"{path} is larger than {MOST_BYTES >> 20} MB: it is not a proof, export the model again")
        raw = json.loads(path.read_bytes(), parse_constant=not_finite)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): copy or export the model again") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not JSON ({error}): export the model again") from error
    if isinstance(raw, dict) and (raw.get("format"), raw.get("format_version")) != (FORMAT, FORMAT_VERSION):
        found = f"format {raw.get('format')!r}, format_version {raw.get('format_version')!r}"
        raise ModelError(f"{path} has {found}; this program reads {FORMAT!r}, {FORMAT_VERSION}")
    problems = faults(raw, SCHEMA | {"format": NAME, "format_version": COUNT})
    problems = problems or contradictions(raw, manifest)
    if problems:
        raise ModelError(f"{path} is damaged, export the model again: {'; '.join(problems[:5])}")
    return build(raw)


def not_finite(constant: str) -> float:
    raise ValueError(f"{constant} is not a finite number")


def contradictions(raw: dict[str, Any], manifest: Manifest) -> list[str]:
    """Values of the right form that do not fit each other or the model."""
    size, vocab = len(raw["ids"]), manifest.config.vocab_size
    found = []
    if not raw["prompt"] <= size <= manifest.config.n_positions:
        found.append(f"{size} ids, {raw['prompt']} of them at once, context {manifest.config.n_positions}")
    rows = ("routes", "margins", "top_ids", "top_log_probs", "other_log_probs", "rest")
    found += [f"{name} has {len(raw[name])} rows for {size} ids" for name in rows if len(raw[name]) != size]
    widths = {"top_ids": len(raw["top_ids"][0]) if size else 0, "other_log_probs": len(raw["other_ids"])}
    widths["top_log_probs"] = widths["top_ids"]
    found += [f"{name} has uneven rows" for name, width in widths.items() if any(len(r) != width for r in raw[name])]
    used = [*raw["ids"], *raw["other_ids"], *(i for row in raw["top_ids"] for i in row)]
    if used and max(used) >= vocab:
        found.append(f"id {max(used)} of a vocabulary of {vocab}")
    if any(route >= len(manifest.leaves) for route in raw["routes"]):
        found.append(f"route {max(raw['routes'])} of {len(manifest.leaves)} leaves")
    if any(position >= size for position in raw["candidate_ties"]):
        found.append(f"a tie at position {max(raw['candidate_ties'])} of {size}")
    if not widths["top_ids"]:
        found.append("no likeliest ids")
    return found


def build(raw: dict[str, Any]) -> Proof:
    return Proof(
        ids=np.array(raw["ids"], np.int64),
        prompt=raw["prompt"],
        tolerance=Tolerance(**{name: raw["tolerance"][name] for name in TOLERANCE}),
        routes=np.array(raw["routes"], np.int64),
        margins=np.array([np.inf if margin is None else margin for margin in raw["margins"]]),
        ties=np.isin(np.arange(len(raw["ids"])), raw["candidate_ties"]),
        top_ids=np.array(raw["top_ids"], np.int64),
        top_log_probs=np.array(raw["top_log_probs"], np.float64),
        other_ids=np.array(raw["other_ids"], np.int64),
        other_log_probs=np.array(raw["other_log_probs"], np.float64).reshape(len(raw["ids"]), -1),
        rest=np.array(raw["rest"], np.float64),
        exported=raw["exported"],
    )
