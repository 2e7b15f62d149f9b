"""Optimizer groups and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.loop.options import TrainOptions

DRAFT_PREFIX = "draft_heads."
HEAD_PREFIXES, GATE_PREFIXES = ("heads.", DRAFT_PREFIX), ("gates.", "head_gates.")
SHARE_OF_DECAY = {"main": 1.0, "heads": 0.1, "gates": 0.1}  # of options.weight_decay

# After the warm-up: share of the remaining work (1 -> 0) -> factor of the learning rate
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
    "constant": lambda left: 1.0,
}


def group_of(name: str) -> str:
    """main, heads or gates: the group of a parameter. A tied head 0 is the embedding, so main."""
    if name.startswith(HEAD_PREFIXES):
        return "heads"
    return "gates" if name.startswith(GATE_PREFIXES) else "main"


def parameter_groups(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """Every parameter of the model in exactly one group, even if frozen: it may be unfrozen and trained later.

    Each group has `names` besides `params`, and `peak_lr`, which the schedule scales.
    """
    rates = {"main": options.lr, "heads": options.head_lr, "gates": options.gate_lr}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        kind, decays = group_of(name), parameter.ndim > 1
        decay = options.weight_decay * SHARE_OF_DECAY[kind] if decays else 0.0
        new = {"params": [], "names": [], "lr": rates[kind], "peak_lr": rates[kind], "weight_decay": decay}
        group = groups.setdefault((kind, decays), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW over parameter_groups(model); adamw8bit keeps its two moments in 8 bits (parameters under 4,096 in 32)."""
    groups = parameter_groups(model, options)
    betas = (options.adam_beta1, options.adam_beta2)
    if options.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=options.lr, betas=betas)
        return optimizer
    kinds = {parameter.device.type for parameter in model.parameters()}
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True if kinds <= {"cpu", "cuda"} else None)


def lr_factor(step: int, total: int, options: TrainOptions) -> float:
    """Factor of every group's peak learning rate at step `step` (from 0) of `total`.

    It rises linearly over the warm-up, never from zero, so no step is wasted, and falls to about zero. The
    warm-up is at most half the run, because a short run would otherwise never reach its peak rate.
    """
    warmup = min(options.warmup_steps, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    return SHAPES[options.lr_schedule](max(0.0, (total - step) / max(1, total - warmup)))


def collect_gradients(model: nn.Module, accelerator: Accelerator, limit: float, apart: str | None = None) -> float:
    """Average the trained parameters' gradients over the processes and clip them; returns their total norm.

    limit: the largest total norm, 0 for none. If the norm is not finite, the gradients stay unchanged. apart: prefix of
    parameters that are clipped by themselves, so that they do not change what the others learn.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    active = [p for _, p in trained]
    if accelerator.num_processes > 1:
        for p in active:  # None for a leaf to which no token of this process was routed
            p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
    others = [p.grad for name, p in trained if p.grad is not None and not (apart and name.startswith(apart))]
    alone = [p.grad for name, p in trained if p.grad is not None and apart and name.startswith(apart)]
    return math.hypot(*(clipped(grads, limit) for grads in (others, alone) if grads))


def clipped(grads: list[Tensor], limit: float) -> float:
    """Scale gradients down to a total norm of `limit` (0: none), unless it is not finite; returns the norm before."""
    norm = torch.stack([grad.norm() for grad in grads]).norm().item()
    if limit and limit < norm < math.inf:
        for grad in grads:
            grad.mul_(limit / norm)
    return norm


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
