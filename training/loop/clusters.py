"""Domains of a text without labels: k-means over the mean trunk outputs of training sequences (`--learn-domains`)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.errors import FieldError
from training.model.generation import DMPTForCausalLM
from training.model.shape import ROOT
from training.progress import Bar
from training.text.batches import TokenBatches
from training.text.domains import NONE

AT_ONCE = 16  # sequences that the trunk runs together
FITTED = 4096  # sequences that the means are fitted on
ROUNDS = 100  # of Lloyd's algorithm, which rarely needs more than twenty


@torch.no_grad()
def learn_domains(model: DMPTForCausalLM, batches: TokenBatches, used: int, count: int, seed: int) -> NDArray[np.int16]:
    """The cluster of the first `used` training sequences in the order of training, NONE for all others: int16 [n].

    A sequence is the mean of the trunk's outputs over its tokens. Raises FieldError when there are too few sequences.
    """
    used = min(used, len(batches))
    if used < count:
        raise FieldError("{learn_domains} {} needs as many training sequences, there are {}", count, used)
    device = next(model.parameters()).device
    means = []
    with Bar(total=used, desc="learning domains", unit="seq") as bar:
        for first in range(0, used, AT_ONCE):
            ids = batches.take(first, min(AT_ONCE, used - first))[:, :-1].to(device)
            means.append(trunk_mean(model, ids).float().cpu())
            bar.update(len(ids))
    points = torch.cat(means)
    chosen = nearest(points, k_means(points[:FITTED], count, seed))
    labels: NDArray[np.int16] = np.full(len(batches), NONE, np.int16)
    labels[batches.order(0)[:used]] = chosen.numpy()
    return labels


def trunk_mean(model: DMPTForCausalLM, ids: Tensor) -> Tensor:
    """Mean output of the trunk's blocks over the tokens: (B, S) -> (B, E)."""
    return model.segment(model.tree[ROOT]).run(model.embed(ids), None).mean(1)


def k_means(points: Tensor, count: int, seed: int) -> Tensor:
    """Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii 2007): (n, E) -> centres (count, E)."""
    generator = torch.Generator().manual_seed(seed)
    points = points.double()
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        far = torch.cdist(points, centres).square().amin(1)
        weights = far if far.sum() > 0 else torch.ones_like(far)  # fewer different points than clusters
        centres = torch.cat([centres, points[torch.multinomial(weights, 1, generator=generator)]])
    for _ in range(ROUNDS):
        own = nearest(points, centres)
        moved = torch.stack([points[own == i].mean(0) if (own == i).any() else centres[i] for i in range(count)])
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each point: (n, E), (k, E) -> int64 (n,)."""
    return torch.cdist(points.double(), centres.double()).argmin(1)
