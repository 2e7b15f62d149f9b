"""Usual values of options that depend on where training starts: at random weights, or at a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.loop.options import TrainOptions, flag
from training.model.shape import Shape

# Defaults for random weights. Learning rate and warm-up are usual for GPT-2 small and smaller; there is no trained head
# to stay near.
SCRATCH: dict[str, Any] = {
    "lr": 6e-4, "head_lr": 6e-4, "gate_lr": 6e-4, "warmup_steps": 200, "freeze_head0_steps": 0, "tether_coef": 0.0,
}  # fmt: skip
LOW, HIGH = 1e-4, 3e-4  # below: too slow for random weights; from: a trained model of GPT-2's size forgets
WIDE = 768  # of GPT-2 small; trained models that are narrower stand higher rates


def warning(options: TrainOptions, shape: Shape, from_scratch: bool) -> str | None:
    """One line that names options far from what suits the start of a run; None if there are none.

    options: of the first phase; later ones start from the model that it trained.
    """
    usual, given = vars(TrainOptions()) | (SCRATCH if from_scratch else {}), vars(options)
    found = [f"{flag(name)} {given[name]} (usual: {usual[name]})" for name in unusual(options, shape, from_scratch)]
    start = "a model from scratch" if from_scratch else f"fine-tuning a model {shape.n_embd} wide"
    return f"Warning: unusual for {start}: {', '.join(found)}" if found else None


def unusual(options: TrainOptions, shape: Shape, from_scratch: bool) -> Iterator[str]:
    """Names of the options that do not suit. An untrained model's length below its context is reported by the run."""
    several = shape.n_vocab_heads > 1
    rates = ["lr", *(["head_lr"] if several else [])]
    if not from_scratch:
        yield from (name for name in rates if shape.n_embd >= WIDE and getattr(options, name) >= HIGH)
        return
    yield from (name for name in rates if 0 < getattr(options, name) < LOW)
    if options.warmup_steps == 0:
        yield "warmup_steps"
    if several:  # freezing head 0 and the tether apply only there
        yield from (name for name in ("freeze_head0_steps", "tether_coef") if getattr(options, name) > 0)
    yield from (name for name in ("freeze_all_transformer", "head_only_phase") if getattr(options, name))
