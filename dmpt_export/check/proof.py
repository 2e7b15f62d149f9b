"""Write the proof of an export: torch's results for some token ids, reduced, for the device to check itself against.

`runtime.proof` reads it and describes its parts; `runtime.self_check` runs it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dmpt_export.check.outcomes import Reference
from dmpt_export.check.reference import prompt_length
from dmpt_export.onnx.manifest import write_manifest
from runtime.manifest_file import PROOF_NAME
from runtime.proof import FORMAT, FORMAT_VERSION, Tolerance
from runtime.self_check import rest_of
from training.errors import ValidationError

PROVEN = 48  # positions: a second or two for GPT-2 small on a device, 14 kB
TOP, OTHERS = 8, 8  # ids whose log-probs are kept: the likeliest of each position, and some for all positions
SEED = 20251
DIGITS = 7  # after the point, of log-probs in nats: a thousandth of the tightest tolerance


def prove(folder: Path, manifest: dict[str, Any], ids: np.ndarray, want: Reference, tolerance: Tolerance) -> None:
    """Write the proof and run it here, as every device will; the figures of this run are kept in it.

    Raises ValidationError where this machine fails it.
    """
    import runtime

    proof = proof_of(ids[:PROVEN], want.part(0, PROVEN), tolerance)
    write(proof, folder)
    write_manifest(manifest, folder)
    with runtime.load(folder) as model:
        found = model.self_check()
    if found.failure is not None:
        raise ValidationError(f"proof for devices, {found.failure}")
    about = found.to_json()
    proof["exported"] = {name: about[name] for name in ("parts", "onnxruntime", "processor", "features")}
    write(proof, folder)


def proof_of(ids: np.ndarray, want: Reference, tolerance: Tolerance) -> dict[str, Any]:
    """What the device reads, from torch's outcome at each of `ids` [S]."""
    vocab = want.log_probs.shape[1]
    others = np.sort(np.random.default_rng(SEED).choice(vocab, min(OTHERS, vocab), replace=False))
    top = np.argsort(-want.log_probs, axis=1, kind="stable")[:, :TOP]
    known = np.concatenate([top, np.broadcast_to(others, (len(ids), len(others)))], axis=1)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ids": ids.tolist(),
        "prompt": prompt_length(len(ids)),
        "tolerance": asdict(tolerance),
        "routes": want.routes.tolist(),
        "margins": [round(float(margin), DIGITS) if np.isfinite(margin) else None for margin in want.margins],
        "candidate_ties": np.flatnonzero(want.edges).tolist(),
        "top_ids": top.tolist(),
        "top_log_probs": np.take_along_axis(want.log_probs, top, 1).astype(float).round(DIGITS).tolist(),
        "other_ids": others.tolist(),
        "other_log_probs": want.log_probs[:, others].astype(float).round(DIGITS).tolist(),
        "rest": rest_of(want.log_probs, known).round(DIGITS).tolist(),
        "exported": None,
    }


def write(proof: dict[str, Any], folder: Path) -> None:
    """One line a field."""
    lines = ",\n".join(f' "{name}": {json.dumps(value, allow_nan=False)}' for name, value in proof.items())
    (folder / PROOF_NAME).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
