"""Runs on the processor under test: the outputs of an exported folder, compared by benchmarks.evidence.processors.

    python processor_probe.py DEVICE OUT.npz

Needs only what the device needs. Prompts of several lengths, single steps after one, and a batch of three texts
where the model allows batches; and what the device's own check (`dmpt-export check`) finds.
"""

from __future__ import annotations

import sys

import numpy as np

import runtime
from runtime.model import Model

PROMPTS = (1, 2, 3, 5, 40)  # tokens
START, STEPS = 3, 12
TEXTS, TOGETHER = (5, 1, 9), 4  # lengths of the prompts of a batch, steps of all rows
SEED = 7


def self_checked(model: Model) -> dict[str, np.ndarray]:
    """`proof`: the first thing that the device's own check finds wrong, or ""; `proof.kl`: its largest mean KL."""
    found = model.self_check()
    kl = [part.kl_mean for part in found.parts if part.kl_mean is not None]
    return {"proof": np.array(found.failure or ""), "proof.kl": np.array(max(kl, default=np.nan))}


def outcomes(model: Model) -> dict[str, np.ndarray]:
    """`<run>.log_probs` float32 [rows, vocab] and `<run>.routes` int64 [rows] of every run."""
    ids = np.random.default_rng(SEED).integers(0, model.vocab_size, 64)
    out: dict[str, np.ndarray] = {}

    def keep(run: str, log_probs: np.ndarray, routes: np.ndarray) -> None:
        out[f"{run}.log_probs"], out[f"{run}.routes"] = log_probs, routes

    for n in PROMPTS:
        keep(f"prompt of {n}", *model.score(ids[:n]))
    sequence = model.sequence()
    rows = [sequence.feed(ids[:START], last=1)]
    rows += [sequence.feed(ids[i : i + 1], last=1) for i in range(START, START + STEPS)]
    keep("single steps", *(np.concatenate(part) for part in zip(*rows, strict=True)))
    if model.manifest.rounds_rows_together:
        return out
    batch = model.batch(len(TEXTS))
    rows = [batch.feed([ids[:n] for n in TEXTS])]
    rows += [batch.step(ids[i : i + len(TEXTS)]) for i in range(TOGETHER)]
    keep("batch", *(np.concatenate(part) for part in zip(*rows, strict=True)))
    return out


if __name__ == "__main__":
    device, file = sys.argv[1:]
    with runtime.load(device, threads=1) as loaded:
        np.savez(file, **outcomes(loaded), **self_checked(loaded))  # type: ignore[arg-type]  # numpy's own overloads
