"""log P(gold token) under a leaf's vocabulary heads, at half the memory traffic of linear + log_softmax + gather.

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
GATHERED = 2**26  # at most this many numbers of candidates' rows at once (256 MB)


def head_gold(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`log softmax(h @ weight.T)[labels]`: (..., E), (V, E), (...) -> (...), float32.

    Matrix products use autocast's dtype if it is enabled; softmax, sums and gradients stay float32.
    """
    gold, _ = _head_at(h.flatten(0, -2), weight, labels.flatten(), 0)
    return gold.view(labels.shape)


def fast_k_gold(inputs: Sequence[Tensor], matrices: Sequence[Tensor], log_pi: Tensor, labels: Tensor, k: int) -> Tensor:
    """log P of given tokens under fast-k, as deployed: H x (..., E), H x (V, E), (..., H), (...) -> (...), float32.

    inputs, matrices: what each head multiplies by which vocabulary matrix; the anchor comes first, and there are at
    least two heads. Equals DMPTForCausalLM.fast_mixture at the labels. A head with a matrix of its own is multiplied in
    full, which is cheaper in a training step than gathering K rows for every token; heads that use the anchor's matrix
    share its gathered rows. The anchor's logits (n, V) are kept; the rest is computed again in the backward pass, slice
    by slice.
    """
    h, *others = (x.flatten(0, -2) for x in inputs)
    log_anchor, ids = _head_at(h, matrices[0], labels.flatten(), k)  # (n, K + 1): the candidates, then the label
    weights = log_pi.flatten(0, -2)
    gathers = any(matrix is matrices[0] for matrix in matrices[1:])
    most = GATHERED // ((k + 1) * h.shape[-1]) if gathers else MANY_ROWS
    parts = [
        checkpoint(
            _fast_k_gold,
            log_anchor[rows],
            ids[rows],
            weights[rows],
            [x[rows] for x in others],
            matrices,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for rows in _slices(h, most)
    ]
    return torch.cat(parts).view(labels.shape)


def _fast_k_gold(
    log_anchor: Tensor, ids: Tensor, log_pi: Tensor, inputs: Sequence[Tensor], matrices: Sequence[Tensor]
) -> Tensor:
    """fast_k_gold of some rows: (n, K + 1), (n, K + 1), (n, H), H - 1 x (n, E), H x (V, E) -> (n,)."""
    anchor, *others = matrices
    log_c, outside = log_anchor[:, :-1], log_anchor[:, -1]
    mass = torch.logsumexp(log_c, -1)
    shared = [x for x, matrix in zip(inputs, others, strict=True) if matrix is anchor]
    logits = iter(torch.einsum("nke,hne->hnk", F.embedding(ids, anchor), torch.stack(shared)) if shared else ())
    within = [outside - mass + log_pi[:, 0]]
    for i, (x, matrix) in enumerate(zip(inputs, others, strict=True), start=1):
        own = next(logits) if matrix is anchor else F.linear(x, matrix).gather(-1, ids)
        own = own.float()
        within.append(own[:, -1] - torch.logsumexp(own[:, :-1], -1) + log_pi[:, i])
    inside = mass + torch.logsumexp(torch.stack(within), dim=0)
    return torch.where((ids[:, :-1] == ids[:, -1:]).any(-1), inside, outside)


def _head_at(h: Tensor, weight: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """log softmax(h @ weight.T) at each row's k largest entries and at its label: (n, E), (V, E), (n,) -> float32 and
    ids, (n, k + 1) each."""
    dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
    values, ids = _HeadAt.apply(h, weight, labels, k, dtype)
    return values, ids


class _HeadAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, k: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        h, weight = h.to(dtype), weight.to(dtype)
        logits = torch.empty(len(h), len(weight), dtype=dtype, device=h.device)
        log_sum = torch.empty(len(h), 1, device=h.device)
        ids = torch.empty(len(h), k + 1, dtype=torch.int64, device=h.device)
        ids[:, k] = labels
        with torch.autocast(h.device.type, enabled=False):
            for rows in _slices(h):
                torch.mm(h[rows], weight.T, out=logits[rows])
                log_sum[rows] = torch.logsumexp(logits[rows].float(), -1, keepdim=True)
                if k:
                    ids[rows, :k] = logits[rows].topk(k, dim=-1, sorted=False).indices
        ctx.save_for_backward(h, weight, ids, logits, log_sum)
        ctx.mark_non_differentiable(ids)
        return logits.gather(-1, ids).float() - log_sum, ids

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        h, weight, ids, logits, log_sum = ctx.saved_tensors
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h) if needs_h else None
        grad_weight = torch.zeros(weight.shape, device=h.device) if needs_weight else None
        total = grad.sum(-1, keepdim=True)
        for rows in _slices(h):
            # d log_softmax[id] / d logits = onehot(id) - softmax
            slope = (logits[rows].float() - log_sum[rows]).exp_().mul_(-total[rows])
            slope = slope.scatter_add_(-1, ids[rows], grad[rows]).to(weight.dtype)
            if grad_h is not None:
                torch.mm(slope, weight, out=grad_h[rows])
            if grad_weight is not None and weight.dtype == torch.float32:
                grad_weight.addmm_(slope.T, h[rows])
            elif grad_weight is not None:
                grad_weight += slope.T @ h[rows]
        return None if grad_h is None else grad_h.float(), grad_weight, None, None, None


def _slices(h: Tensor, most: int = MANY_ROWS) -> list[slice]:
    step = max(1, min(ROWS.get(h.device.type, MANY_ROWS), most))
    return [slice(start, start + step) for start in range(0, len(h), step)]
