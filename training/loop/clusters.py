"""Domains of a text without names: k-means over the mean trunk outputs of training sequences (`--learn-domains`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.errors import FieldError
from training.model.domains import cluster_names
from training.model.generation import DMPTForCausalLM
from training.model.shape import ROOT
from training.progress import Bar
from training.text.batches import TokenBatches
from training.text.domains import Domains

AT_ONCE = 16  # sequences that the trunk runs together
FITTED = 4096  # sequences that the centres are fitted on
ROUNDS = 100  # of Lloyd's algorithm, which rarely needs more than twenty


@torch.no_grad()
def learn_domains(model: DMPTForCausalLM, tokens: np.ndarray, length: int, count: int, seed: int) -> Domains:
    """The cluster of every training sequence of `length` tokens, the largest first: learned-1 ... learned-<count>.

    A sequence is the mean of the trunk's outputs over its tokens; the trunk runs over the whole text once.
    Raises FieldError when there are fewer sequences than clusters.
    """
    batches = TokenBatches(tokens, length, seed)
    if len(batches) < count:
        raise FieldError("{learn_domains} {} needs as many training sequences, there are {}", count, len(batches))
    model.eval()
    device, means = next(model.parameters()).device, []
    with Bar(total=len(batches), desc="learning domains", unit="seq") as bar:
        for first in range(0, len(batches), AT_ONCE):
            ids = torch.from_numpy(batches.rows[first : first + AT_ONCE, :-1].astype(np.int64)).to(device)
            means.append(trunk_mean(model, ids).float().cpu())
            bar.update(len(ids))
    points = torch.cat(means)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:FITTED]
    own = nearest(points, k_means(points[order], count, seed))
    by_size = torch.bincount(own, minlength=count).argsort(descending=True, stable=True)
    labels = by_size.argsort()[own].to(torch.int16).numpy()
    ends = np.append(np.arange(1, len(batches) + 1, dtype=np.int64) * length, len(tokens))
    return Domains(cluster_names(count), ends, np.append(labels, labels[-1]))


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
