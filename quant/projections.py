"""Full vocabulary heads -> projected heads: the model, the calibration rows that its heads see, and what is lost."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.projection_fit import Rows, fit
from training.checkpoints.checkpoint import model_from_tensors
from training.model.dmpt import ROWS_AT_ONCE
from training.model.generation import DMPTForCausalLM
from training.model.new_shape import projected_fields

HELD_OUT = 4  # the last of so many parts of the text is measured on and not fitted


@dataclass(frozen=True, eq=False)
class Projected:
    """A model with projected heads, and how far it is from the one with full heads on the held-out windows."""

    model: DMPTForCausalLM
    tokens: int  # held out
    kl: float  # of the deployed distributions, nats per token
    perplexity: float
    perplexity_before: float


def project_heads(model: DMPTForCausalLM, windows: Tensor, rank: int | None = None) -> Projected:
    """Fit a projection to each full head that is not an anchor, on windows [n, S] of text, n and S at least 2.

    Memory: 8 bytes times fitted tokens times candidates (fast_k, or the vocabulary), in addition to the models.
    Raises InputError as projected_fields.
    """
    config = copy.deepcopy(model.config)
    for name, value in projected_fields(model.config, rank).items():
        setattr(config, name, value)
    held_out = max(1, len(windows) // HELD_OUT)
    routed = routed_rows(model, windows[:-held_out])
    matrices = [head.weight.detach() for head in model.heads]  # type: ignore[operator]  # all are full
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for anchor in dict.fromkeys(heads[0] for heads in config.head_allocation.values()):
        leaves = [leaf for leaf, heads in config.head_allocation.items() if heads[0] == anchor]
        rows = [leaf_rows(model, leaf, routed[leaf], config.projected_heads) for leaf in leaves]
        heads = {j: matrices[j] for part in rows for j in part.heads}
        if not heads:
            continue
        for j, parts in fit(matrices[anchor], heads, rows, rank).items():
            del tensors[f"heads.{j}.weight"]
            tensors |= zip(config.projection_names(j), parts, strict=True)
    return measure(model, model_from_tensors(config, tensors), windows[-held_out:])


@torch.no_grad()
def routed_rows(model: DMPTForCausalLM, windows: Tensor) -> dict[str, Tensor]:
    """What each leaf's heads multiply, (n, E): for the tokens routed to it, or for all tokens where none is."""
    routed: dict[str, list[Tensor]] = {leaf: [] for leaf in model.config.leaves}
    every: dict[str, list[Tensor]] = {leaf: [] for leaf in model.config.leaves}
    for window in windows.split(1):
        hidden = model.hidden(window)
        routes = model.routes(hidden.gates) if hidden.gates else torch.zeros_like(window)
        for i, (leaf, h) in enumerate(hidden.leaves.items()):
            routed[leaf].append(h[routes == i])
            every[leaf].append(h[0])
    return {leaf: torch.cat(rows if any(map(len, rows)) else every[leaf]) for leaf, rows in routed.items()}


@torch.no_grad()
def leaf_rows(model: DMPTForCausalLM, leaf: str, h: Tensor, projected: Collection[int]) -> Rows:
    """Rows h (n, E) of a leaf, with its full heads' probabilities among the anchor's candidates."""
    config = model.config
    allocated = config.head_allocation[leaf]
    stays = [j == allocated[0] or j not in projected for j in allocated]
    weights = torch.zeros(config.vocab_size)
    parts: list[tuple[Tensor, ...]] = []
    for x in h.split(ROWS_AT_ONCE):
        log_pi = model.head_log_weights(leaf, x)
        logits = torch.stack([model.head_logits(leaf, j, x) for j in allocated])  # (heads, m, V)
        log_anchor = F.log_softmax(logits[0], -1)
        log_c, candidates = log_anchor.topk(config.fast_k, -1) if config.fast_k else (log_anchor, None)
        if candidates is not None:
            logits = logits.gather(-1, candidates.expand(len(allocated), -1, -1))
        scored = F.log_softmax(logits, -1) + log_pi.T[..., None]  # (heads, m, K)
        want = torch.logsumexp(scored, 0)
        mass = log_c.logsumexp(-1).exp()
        kept, own = torch.logsumexp(scored[stays], 0), log_pi[:, [not stay for stay in stays]]
        parts.append((mass, kept, own, want, *([] if candidates is None else [candidates])))
        inside = log_c.logsumexp(-1, keepdim=True) + want
        deployed = want if candidates is None else log_anchor.scatter(-1, candidates, inside)
        weights += deployed.exp().sum(0)
    mass, kept, own, want, *rest = (torch.cat(part) for part in zip(*parts, strict=True))
    heads = [j for j, stay in zip(allocated, stays, strict=True) if not stay]
    return Rows(heads, h, rest[0] if rest else None, mass, kept, own, want, weights)


@torch.no_grad()
def measure(full: DMPTForCausalLM, projected: DMPTForCausalLM, windows: Tensor) -> Projected:
    """Both models as deployed, on windows [n, S] that the fit has not seen. They share blocks and gates."""
    divergence, gold = [], []
    for window in windows.split(1):
        hidden = full.hidden(window)
        routes = full.routes(hidden.gates) if hidden.gates else torch.zeros_like(window)
        want, got = (model.pick(hidden.leaves, routes, model.config.fast_k)[0] for model in (full, projected))
        divergence.append((want.exp() * (want - got)).sum(-1).double())
        gold.append(torch.stack([x[:-1].gather(1, window[0, 1:, None])[:, 0].double() for x in (want, got)]))
    before, after = (math.exp(min(-float(log_p.mean()), 700.0)) for log_p in torch.cat(gold, 1))
    kl = max(float(torch.cat(divergence).mean()), 0.0)  # can be below 0 by rounding
    return Projected(projected, windows.numel(), kl, after, before)
