"""Which leaf is trained on which part of a batch: `--train-path-selection best`.

Hard expectation-maximisation: every leaf is scored without gradient, the best one is trained (a mixture of experts with
a maximum instead of a sum, Jacobs et al. 1991). A unit is a token, a segment or a sequence. Balanced: a leaf takes at
most its share of the units, as in BASE layers (Lewis et al. 2021), which solve the same problem exactly by auctions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.loop.options import SEGMENT, TOKEN

SEGMENT_TOKENS = 64


def best_leaves(gold: Tensor, mask: Tensor | None, unit: str, balanced: bool) -> Tensor:
    """The leaf of each token: gold (L, B, S), log P_leaf of the labels -> int64 (B, S). A tie goes to the first leaf.

    mask: (B, S), the tokens that count in a unit's score; None: all. unit: token, segment or sequence.
    """
    length = gold.shape[-1]
    size = {TOKEN: 1, SEGMENT: min(SEGMENT_TOKENS, length)}.get(unit, length)
    counted = gold.detach() if mask is None else gold.detach().where(mask, 0.0)
    scores = F.pad(counted, (0, -length % size)).unflatten(-1, (-1, size)).sum(-1)  # (L, B, units)
    best = balanced_best(scores.flatten(1)).view(scores.shape[1:]) if balanced else scores.argmax(0)
    return best.repeat_interleave(size, dim=-1)[:, :length]


def balanced_best(scores: Tensor) -> Tensor:
    """The leaf of each unit, at most ceil(units / leaves) for each: (L, units) -> (units,).

    Units choose in the order of what they would lose by their second choice. When a leaf is full, the others choose
    anew. For two leaves no assignment has a larger total; for more it is near the largest.
    """
    leaves, units = scores.shape
    room = torch.full((leaves,), -(-units // leaves), device=scores.device)
    out = torch.full((units,), -1, device=scores.device)
    while (left := (out < 0).nonzero()[:, 0]).numel():
        open_ = scores[:, left].masked_fill((room == 0)[:, None], -torch.inf)
        first, *second = open_.topk(min(2, leaves), dim=0).values
        order = (first - second[0] if second else first).argsort(descending=True, stable=True)
        wanted = open_.argmax(0)[order]
        nth = F.one_hot(wanted, leaves).cumsum(0).gather(1, wanted[:, None])[:, 0]  # of those that want the same leaf
        refused = (nth > room[wanted]).nonzero()
        until = int(refused[0]) if len(refused) else len(left)
        out[left[order[:until]]] = wanted[:until]
        room -= F.one_hot(wanted[:until], leaves).sum(0)
    return out
