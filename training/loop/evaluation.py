"""Held-out loss of the model as deployed, with the protocol of `dmpt-export eval`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from training.model.generation import DMPTForCausalLM
from training.model.shape import GATE_HARD
from training.text.windows import windows

ROWS_AT_ONCE = 1024  # predictions scored at once: their (rows, vocab) log-probs are held in memory


@dataclass
class Evaluation:
    loss: float  # mean negative log-likelihood, nats per token
    accuracy: float  # share of tokens that were the likeliest
    tokens: int  # scored


@torch.no_grad()
def evaluate(
    model: DMPTForCausalLM,
    tokens: np.ndarray,
    length: int,
    stride: int,
    mode: str = GATE_HARD,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Score `tokens` [n] in windows of `length` advancing by `stride`, with the config's fast_k.

    With an accelerator, the windows are split among its processes and every process gets the whole result.
    The model must be in eval mode.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, hits, tokens
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for number, (ids, scored) in enumerate(window_batches(tokens, length, stride)):
        if number % world == rank:
            totals += score(model, ids.to(device), scored, mode)
    if accelerator is not None and world > 1:
        totals = accelerator.reduce(totals.to(device), "sum").cpu()
    nll, hits, count = totals.tolist()
    return Evaluation(nll / max(count, 1), hits / max(count, 1), int(count))


def window_batches(tokens: np.ndarray, length: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Batches of windows of equal shape: (ids int64 (B, S + 1), scored predictions per window).

    A window of n tokens has n - 1 predictions.
    """
    shapes = groupby(windows(len(tokens), length, stride), key=lambda w: (w[1] - w[0], w[2]))
    for (_, scored), same in shapes:
        batch: list[np.ndarray] = []
        for start, stop, _ in same:
            batch.append(tokens[start:stop])
            if len(batch) * scored >= ROWS_AT_ONCE:
                yield torch.from_numpy(np.stack(batch).astype(np.int64)), scored
                batch = []
        if batch:
            yield torch.from_numpy(np.stack(batch).astype(np.int64)), scored


def score(model: DMPTForCausalLM, ids: Tensor, scored: int, mode: str) -> Tensor:
    """[negative log-likelihood, hits, tokens] of the last `scored` predictions of each window: float64 (3,)."""
    log_probs = model.log_probs(ids[:, :-1], mode, model.config.fast_k, last=scored)
    labels = ids[:, -scored:]
    nll = -log_probs.gather(-1, labels[..., None]).sum(dtype=torch.float64)
    hits = (log_probs.argmax(-1) == labels).sum()
    return torch.tensor([nll.item(), hits.item(), labels.numel()], dtype=torch.float64)
