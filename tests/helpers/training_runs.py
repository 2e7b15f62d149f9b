"""Short training runs: options, text with something to learn, the files of a run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from training.loop.interrupt import Interrupted
from training.loop.options import TrainOptions
from training.loop.trainer import train
from training.model.generation import DMPTForCausalLM

LENGTH = 16


def options(**changes: Any) -> TrainOptions:
    base = TrainOptions(
        max_steps=6, max_length=LENGTH, batch_size=2, grad_accum_steps=2, lr=1e-3, head_lr=1e-3, gate_lr=1e-3,
        warmup_steps=2, freeze_head0_steps=0, log_every=1, eval_every=100, save_every=100, dropout=0.1, cpu=True,
    )  # fmt: skip
    return replace(base, **changes)


def some_tokens(n: int = 1500, seed: int = 0) -> np.ndarray:
    """Text with something to learn: each token is most often followed by the same one."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros(n, np.int32)
    for i in range(1, n):
        tokens[i] = (tokens[i - 1] * 5 + 1) % 97 if rng.random() < 0.9 else rng.integers(97)
    return tokens


TOKENS = some_tokens()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    return [record["loss"] for record in metrics(out) if "loss" in record]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def interrupted_at(
    model: DMPTForCausalLM, run: Path, step: int, settings: TrainOptions, tokens: np.ndarray = TOKENS, **more: Any
) -> None:
    """Train until `step`, then stop as after SIGTERM."""
    before = torch.optim.AdamW.step
    done = 0

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counting)
        with pytest.raises(Interrupted, match=f"after step {step} of") as stop:
            train(model, tokens, settings, run, **more)
    assert "--resume" in str(stop.value)
    assert stop.value.exit_code == 130
