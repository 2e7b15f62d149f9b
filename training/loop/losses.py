"""The auxiliary terms of training: load balance, gold-aux, domains, switches, further tokens, tether, head balance and
entropy.

Pure functions of log weights and log-probs. Shapes: B batch, S tokens, L leaves, H heads of a leaf, V vocabulary.
`mask` (B, S) bool marks the tokens that count; None means all. Every term is a mean over those tokens, so neither
padding nor sequence length changes its size; the trainer sums it over split nodes or leaves. The balance terms are
not means of per-token values: `across` (the mean over processes) makes them independent of the number of processes
that compute a batch.

Source of the terms: S. Qian, "Dynamic Multiple Path Transformer" (2025), with the formulas corrected; switches are this
project's. Further tokens: Gloeckle et al., "Better & Faster Large Language Models via Multi-token Prediction" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model.shape import Node

Across = Callable[[Tensor], Tensor]  # mean of a tensor over all processes, without gradient


def alone(value: Tensor) -> Tensor:
    """`across` of a single process."""
    return value


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` (B, S, ...) over the tokens that count: (...)."""
    flat = values.flatten(0, 1)
    if mask is None:
        return flat.mean(0)
    # where, not a product: a masked token may hold inf or NaN
    keep = mask.flatten().view(-1, *[1] * (flat.ndim - 1))
    return torch.where(keep, flat, 0.0).sum(0) / mask.sum().clamp_min(1)


def global_mean(values: Tensor, mask: Tensor | None, across: Across) -> Tensor:
    """masked_mean over the batches of all processes; each process gets the gradient of its own part.

    Averaging the processes' gradients then gives exactly the gradient of the global mean.
    """
    mean = masked_mean(values, mask)
    return mean + (across(mean.detach()) - mean.detach())


def load_balance(
    log_gates: dict[str, Tensor],
    tree: dict[str, Node],
    mask: Tensor | None = None,
    across: Across = alone,
    nodes: Collection[str] | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Sum over split nodes of `(mean w_left - 1/2)^2 + (mean w_right - 1/2)^2`.

    log_gates: split node -> (B, S, 2), log of the node's own gate weights. Below the first split, a token is weighted
    by the gate weight with which it reaches the node (without gradient), so the balance is that of the tokens that
    actually reach it.
    nodes: the split nodes of the sum; None: all. counted: (B,) bool, the sequences of the means; None: all.
    """
    total = torch.zeros(())
    for name in log_gates if nodes is None else nodes:
        log_w = log_gates[name]
        reach, node = torch.zeros_like(log_w[..., 0]), tree[name]
        while node.parent is not None:
            above = tree[node.parent]
            assert above.children is not None
            reach = reach + log_gates[above.name][..., above.children.index(node.name)]
            node = above
        weight = reach.detach().exp()[..., None]
        if counted is not None:
            weight = weight * counted[:, None, None]
        tokens = global_mean(weight, mask, across).clamp_min(torch.finfo(weight.dtype).tiny)
        share = global_mean(weight * log_w.exp(), mask, across) / tokens
        total = total + (share - 0.5).square().sum()
    return total


def gold_aux(log_w: Tensor, best: Tensor, mask: Tensor | None = None) -> Tensor:
    """`-log w` of the leaf that gives the gold token the highest probability: log_w (L, B, S), best int64 (B, S) -> ().

    The term trains the gates, not the leaves.
    """
    return masked_mean(-log_w.gather(0, best[None])[0], mask)


def taught(log_p: Tensor, serves: Tensor, weight: Tensor, across: Across = alone) -> Tensor:
    """Mean of `-log of the weight of the choices that serve a token`: log_p (B, S, C), serves (B, C) bool -> ().

    weight: (B, S), of each token in the mean, without gradient; 0 for tokens that are not taught. C: leaves, or the
    heads of one leaf.
    """
    weight = weight.detach() * serves.any(-1)[:, None]
    mine = log_p.masked_fill(~serves[:, None], -torch.inf)
    mine = torch.where(weight[..., None] > 0, mine, 0.0)  # a row of only -inf would have the gradient NaN
    loss = torch.where(weight > 0, -torch.logsumexp(mine, -1), 0.0)
    mean: Tensor = (weight * loss).mean() / across(weight.mean()).clamp_min(torch.finfo(loss.dtype).tiny)
    return mean


def switches(log_w: Tensor, joined: Tensor) -> Tensor:
    """Expected share of neighbouring tokens that take different leaves: log_w (L, B, S), joined (B, S - 1) -> ().

    `1 - sum_l w_l(t) w_l(t-1)`, as if both leaves were drawn from the gates. joined: whether token t + 1 follows token
    t in one text; pairs that do not are left out.
    """
    same = (log_w[..., 1:] + log_w[..., :-1]).exp().sum(0)
    return masked_mean(1.0 - same, joined)


def further_tokens(gold: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy of tokens further ahead: gold, weights (L, N, B, S), counts (N, B, S) bool -> ().

    gold: log P_leaf of the token i + 2 after each position, i from 0 to N - 1. weights: share of each leaf in the loss
    of a position, without gradient, so the gates do not learn from this term. counts: whether that token exists, counts
    and belongs to the same text. Every distance weighs the same, however many of its targets count.
    """
    loss = torch.where(counts, -(weights.detach() * gold).sum(0), 0.0).flatten(1).sum(1)
    return (loss / counts.flatten(1).sum(1).clamp_min(1)).mean()


def tether(reference: Tensor, log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of `KL(reference || path)`: log-probs (B, S, V), (B, S, V) -> (). No gradient to reference."""
    kl = F.kl_div(log_probs, reference.detach(), reduction="none", log_target=True).sum(-1)
    return masked_mean(kl, mask)


def head_balance(log_pi: Tensor, mask: Tensor | None = None, across: Across = alone) -> Tensor:
    """`KL(mean pi || uniform)` of one leaf: log_pi (B, S, H) -> (). 0 when the heads are used equally on average."""
    mean = global_mean(log_pi.exp(), mask, across)
    return (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum() + math.log(len(mean))


def head_entropy(log_pi: Tensor, kept: int, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of `log K - H(pi)`: log_pi (B, S, H) -> (). 0 when every token mixes its K heads equally.

    kept: K, the number of mixed heads; with head_topk fewer than H, and the others have log_pi = -inf.
    """
    # log_pi of a left-out head is -inf: 0 * -inf must count as 0, in the gradient too
    finite = log_pi.masked_fill(log_pi == -torch.inf, 0.0)
    entropy = -(log_pi.exp() * finite).sum(-1)
    return masked_mean(math.log(kept) - entropy, mask)
