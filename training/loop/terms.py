"""The auxiliary terms of the training loss, by name. A term is one function here and one line in TERMS; its coefficient
is the field `<name>_coef` of training.loop.options.TrainOptions. The formulas are in training.loop.losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.loop import losses
from training.loop.cross_entropy import head_gold
from training.loop.losses import Across
from training.model.dmpt import Hidden
from training.model.domains import heads_of, leaves_of, leaves_under
from training.model.generation import DMPTForCausalLM
from training.model.shape import Shape
from training.text.domains import NONE


@dataclass
class Taught:
    """What serves each domain. D domains; the last row stands for text without one, so NONE is an index too."""

    names: tuple[str, ...]
    leaves: Tensor  # (D + 1, L) bool
    heads: dict[str, Tensor]  # leaf with heads for some domain -> (D + 1, H) bool
    nodes: list[list[str]]  # D + 1, the split nodes with leaves for the domain on both sides

    @classmethod
    def of(cls, config: Shape, names: Sequence[str] = ()) -> Taught:
        """By the model's configuration, which has all these domains."""
        served = [(config.domains or {})[name] for name in names]
        leaves = [leaves_of(one, config.head_allocation) for one in served]
        places = [heads_of(one, config.head_allocation) for one in served]
        heads = {leaf: len(own) for leaf, own in config.head_allocation.items() if any(leaf in p for p in places)}
        rows = [*leaves, config.leaves]
        return cls(
            tuple(names),
            torch.tensor([[leaf in row for leaf in config.leaves] for row in leaves] + [[False] * len(config.leaves)]),
            {
                leaf: torch.tensor([[i in p.get(leaf, ()) for i in range(n)] for p in places] + [[False] * n])
                for leaf, n in heads.items()
            },
            [[name for name in config.split_nodes if both_sides(config, name, row)] for row in rows],
        )


def both_sides(config: Shape, node: str, leaves: Sequence[str]) -> bool:
    """Whether some of the leaves are under each child of a split node."""
    children = config.tree[node].children or ()
    return all(set(leaves_under(child, config.leaves)) & set(leaves) for child in children)


@dataclass
class Batch:
    """What is known of a batch when the terms are computed. B batch, S tokens, L leaves, H heads of a leaf."""

    model: DMPTForCausalLM
    hidden: Hidden
    mask: Tensor | None  # (B, S) bool: tokens that count
    across: Across
    gold: Tensor  # (L, B, S), log P_leaf of the labels
    log_w: Tensor | None  # (L, B, S), log of the leaves' gate weights; None for one leaf
    joined: Tensor  # (B, S - 1) bool: whether a token and the next one belong to one text
    labels: Tensor  # (B, S)
    same_text: Tensor  # (N, B, S) bool: whether the token i + 2 after each position counts and belongs to its text
    detached: bool  # draft heads learn from further tokens, nothing else does
    domains: Tensor | None  # (B,), index into taught.names or NONE; None: a text without domains
    taught: Taught
    best: Tensor | None  # (B, S), the leaf that is trained, where its gold alone is known
    full: dict[str, tuple[Tensor, Tensor]]  # leaf -> log-probs (B, S, V) of the tether's reference and of the leaf
    log_pi: dict[str, Tensor] = field(default_factory=dict)  # leaf with several heads -> (B, S, H)


Term = Callable[[Batch], Iterator[tuple[str, Tensor]]]  # ("" or ".leaf", value ()), nothing where there is no choice


def load_balance(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Within each domain, only where leaves on both sides of a gate serve it; the domains' sums by their tokens."""
    if batch.log_w is None:
        return
    temp, tree = batch.model.config.gate_temp, batch.model.tree
    log_gates = {name: F.log_softmax(g.float() / temp, -1) for name, g in batch.hidden.gates.items()}
    if batch.domains is None:
        yield "", losses.load_balance(log_gates, tree, batch.mask, batch.across)
        return
    total = torch.zeros((), device=batch.labels.device)
    for domain in range(NONE, len(batch.taught.names)):
        counted = batch.domains == domain
        share = losses.global_mean(counted[:, None].expand_as(batch.labels).float(), batch.mask, batch.across)
        nodes = batch.taught.nodes[domain]
        total = total + share * losses.load_balance(log_gates, tree, batch.mask, batch.across, nodes, counted)
    yield "", total


def domain(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Gates learn the leaves that serve a sequence's domain, and head gates the heads that do."""
    if batch.domains is None:
        return
    known = (batch.domains >= 0)[:, None].expand_as(batch.labels).float()
    known = known if batch.mask is None else known * batch.mask
    if batch.log_w is not None:
        serves = batch.taught.leaves.to(known.device)[batch.domains]
        yield "", losses.taught(batch.log_w.movedim(0, -1), serves, known, batch.across)
    for i, (leaf, h) in enumerate(batch.hidden.leaves.items()):
        if leaf in batch.taught.heads:
            # before head_topk, which would leave a head that is not mixed without a way back
            log_pi = F.log_softmax(batch.model.head_gates[leaf](h).float() / batch.model.config.head_gate_temp, -1)
            weight = known if batch.log_w is None else known * batch.log_w[i].exp()
            serves = batch.taught.heads[leaf].to(known.device)[batch.domains]
            yield f".{leaf}", losses.taught(log_pi, serves, weight, batch.across)


def gold_aux(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    if batch.log_w is not None:
        best = batch.gold.detach().argmax(0) if batch.best is None else batch.best
        yield "", losses.gold_aux(batch.log_w, best, batch.mask)


def switch(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    if batch.log_w is not None:
        yield "", losses.switches(batch.log_w, batch.joined)


def next_tokens(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Leaf by leaf, without storing (B, S, V) log-probs. Targets beyond the batch do not count."""
    n, size = batch.model.config.next_tokens, batch.labels.shape[1]
    if not n:
        return
    rows = []
    for leaf, h in batch.hidden.leaves.items():
        matrix = batch.model.draft_matrix(leaf)
        if batch.detached:
            h, matrix = h.detach(), matrix.detach()
        gold = h.new_zeros((n, *batch.labels.shape), dtype=torch.float32)
        for i in range(min(n, size - 1)):
            ahead = i + 1
            x = batch.model.draft_input(leaf, i, h[:, :-ahead])
            gold[i, :, :-ahead] = head_gold(x, matrix, batch.labels[:, ahead:])
        rows.append(gold)
    weights = torch.ones_like(batch.gold) if batch.log_w is None else batch.log_w.exp()
    yield "", losses.further_tokens(torch.stack(rows), weights[:, None], batch.same_text)


def tether(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for leaf, (reference, log_probs) in batch.full.items():
        yield f".{leaf}", losses.tether(reference, log_probs, batch.mask)


def head_balance(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for leaf, log_pi in batch.log_pi.items():
        yield f".{leaf}", losses.head_balance(log_pi, batch.mask, batch.across)


def head_entropy(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for leaf, log_pi in batch.log_pi.items():
        heads = log_pi.shape[-1]
        kept = min(batch.model.config.head_topk or heads, heads)  # heads that a token mixes
        yield f".{leaf}", losses.head_entropy(log_pi, kept, batch.mask)


TERMS: dict[str, Term] = {
    "lb": load_balance,
    "gold_aux": gold_aux,
    "domain": domain,
    "switch": switch,
    "next_tokens": next_tokens,
    "tether": tether,
    "head_lb": head_balance,
    "head_entropy": head_entropy,
}
