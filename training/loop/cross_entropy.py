"""log P(gold token) under one vocabulary head, at half the memory traffic of linear + log_softmax + gather.

A head is most of a small model's work, and on a CPU half of that time goes into repeated passes over its (rows, vocab)
logits. Here they are written once and read once: all elementwise work happens on slices that stay in cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = {"cpu": 256}  # rows per slice; on other devices, fewer and larger kernels matter more
MANY_ROWS = 8192


def head_gold(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`log softmax(h @ weight.T)[labels]`: (..., E), (V, E), (...) -> (...), float32.

    Matrix products use autocast's dtype if it is enabled; softmax, sums and gradients stay float32.
    """
    dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
    gold: Tensor = _HeadGold.apply(h.flatten(0, -2), weight, labels.flatten(), dtype)
    return gold.view(labels.shape)


def fast_k_gold(h: Tensor, heads: Sequence[Tensor], log_pi: Tensor, labels: Tensor, k: int) -> Tensor:
    """log P of given tokens under fast-k, as deployed: (..., E), H x (V, E), (..., H), (...) -> (...), float32.

    The anchor is the first of `heads`. Equals DMPTForCausalLM.fast_mixture at the labels, but multiplies every head in
    full, which is cheaper in a training step than gathering K rows for every token. The backward pass recomputes the
    slices' (rows, V) logits, so only one slice is in memory at a time.
    """
    flat, weights, wanted = h.flatten(0, -2), log_pi.flatten(0, -2), labels.flatten()
    parts = [
        checkpoint(
            _fast_k_gold,
            flat[rows],
            weights[rows],
            wanted[rows],
            k,
            *heads,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for rows in _slices(flat)
    ]
    return torch.cat(parts).view(labels.shape)


def _fast_k_gold(h: Tensor, log_pi: Tensor, labels: Tensor, k: int, anchor: Tensor, *others: Tensor) -> Tensor:
    """fast_k_gold of some rows: (n, E), (n, H), (n,) -> (n,)."""
    label = labels[:, None]
    log_anchor = F.log_softmax(F.linear(h, anchor).float(), -1)
    log_c, candidates = log_anchor.topk(k, dim=-1)  # (n, K)
    mass = torch.logsumexp(log_c, -1, keepdim=True)
    outside = log_anchor.gather(-1, label)
    within = [outside - mass + log_pi[:, :1]]
    for i, head in enumerate(others, start=1):
        logits = F.linear(h, head).float()
        among = torch.logsumexp(logits.gather(-1, candidates), -1, keepdim=True)
        within.append(logits.gather(-1, label) - among + log_pi[:, i, None])
    inside = mass + torch.logsumexp(torch.stack(within), dim=0)
    return torch.where((candidates == label).any(-1, keepdim=True), inside, outside)[:, 0]


class _HeadGold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        h, weight = h.to(dtype), weight.to(dtype)
        logits = torch.empty(len(h), len(weight), dtype=dtype, device=h.device)
        log_sum = torch.empty(len(h), 1, device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            for rows in _slices(h):
                torch.mm(h[rows], weight.T, out=logits[rows])
                log_sum[rows] = torch.logsumexp(logits[rows].float(), -1, keepdim=True)
        ctx.save_for_backward(h, weight, labels, logits, log_sum)
        return (logits.gather(-1, labels[:, None]).float() - log_sum)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, weight, labels, logits, log_sum = ctx.saved_tensors
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h) if needs_h else None
        grad_weight = torch.zeros(weight.shape, device=h.device) if needs_weight else None
        grad = grad[:, None]
        for rows in _slices(h):
            # d gold / d logits = onehot - softmax
            slope = (logits[rows].float() - log_sum[rows]).exp_().mul_(-grad[rows])
            slope = slope.scatter_add_(-1, labels[rows, None], grad[rows]).to(weight.dtype)
            if grad_h is not None:
                torch.mm(slope, weight, out=grad_h[rows])
            if grad_weight is not None and weight.dtype == torch.float32:
                grad_weight.addmm_(slope.T, h[rows])
            elif grad_weight is not None:
                grad_weight += slope.T @ h[rows]
        return None if grad_h is None else grad_h.float(), grad_weight, None, None


def _slices(h: Tensor) -> list[slice]:
    step = ROWS.get(h.device.type, MANY_ROWS)
    return [slice(start, start + step) for start in range(0, len(h), step)]
