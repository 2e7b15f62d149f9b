"""A run's entry in the training record (training.checkpoints.record)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from training.checkpoints.atomic import atomic_file
from training.checkpoints.checkpoint import write_json
from training.checkpoints.files import read_json
from training.checkpoints.record import FIELD, Phase, Record, recorded
from training.loop.optim import group_of
from training.loop.options import TrainOptions
from training.loop.state import Progress
from training.model.config import DMPTConfig
from training.model.generation import DMPTForCausalLM
from training.model.shape import EMBEDDING, POSITIONS

# Options that decide how far equal tokens take a model; those of parameter groups only where the model has the group.
SETTINGS = ("lr", "lr_schedule", "warmup_steps", "weight_decay")
OF_GROUPS = {"heads": "head_lr", "gates": "gate_lr"}


def phase_of(model: DMPTForCausalLM, options: TrainOptions, progress: Progress, length: int, step_tokens: int) -> Phase:
    """The run up to now. length: tokens of a sequence; step_tokens: of an optimizer step, over all processes."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    computed = sum(size for name, size in sizes.items() if name not in (EMBEDDING, POSITIONS))
    computed += sizes[EMBEDDING] * model.config.tie_word_embeddings  # as the head
    computed += sizes[EMBEDDING] * repeated_products(model.config, options)
    tokens, groups = progress.position * length, {group_of(name) for name in sizes}
    names = [*SETTINGS, *(name for group, name in OF_GROUPS.items() if group in groups)]
    settings = {name: getattr(options, name) for name in names}
    settings |= {"dropout": model.config.resid_pdrop, "step_tokens": step_tokens}
    crc = f"{progress.data['crc32']:08x}"
    return Phase(tokens, progress.step, 6.0 * computed * tokens, options.seed, crc, length, settings=settings)


def repeated_products(config: DMPTConfig, options: TrainOptions) -> int:
    """Products with a vocabulary matrix beyond its first: of anchors that share one, and without fast_k_loss of all
    heads that use a matrix."""
    heads = slice(1 if options.fast_k_loss else None)
    used = [config.matrix_of(leaf, j) for leaf, own in config.head_allocation.items() for j in own[heads]]
    return len(used) - len(set(used))


def note_best_of(folder: Path, tokens: int) -> None:
    """Record in a finished run's best checkpoint that it was chosen from a run of `tokens`."""
    fields = read_json(folder / "config.json")
    record = recorded(fields)
    if record is None or not record.phases:
        return
    *earlier, last = record.phases
    phases = (*earlier, replace(last, best_of=tokens))
    with atomic_file(folder / "config.json") as tmp:
        write_json(tmp, fields | {FIELD: Record(record.base, phases).to_json()})
