"""The auxiliary terms of the training loss, by name. A term is one function here and one line in TERMS; its coefficient
is the field `<name>_coef` of training.loop.options.TrainOptions. The formulas are in training.loop.losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.loop import losses
from training.loop.cross_entropy import head_gold
from training.loop.losses import Across
from training.model.dmpt import Hidden
from training.model.generation import DMPTForCausalLM


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
    best: Tensor | None  # (B, S), the leaf that is trained, where its gold alone is known
    full: dict[str, tuple[Tensor, Tensor]]  # leaf -> log-probs (B, S, V) of the tether's reference and of the leaf
    log_pi: dict[str, Tensor] = field(default_factory=dict)  # leaf with several heads -> (B, S, H)


Term = Callable[[Batch], Iterator[tuple[str, Tensor]]]  # ("" or ".leaf", value ()), nothing where there is no choice


def load_balance(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    if batch.log_w is not None:
        temp = batch.model.config.gate_temp
        log_gates = {name: F.log_softmax(g.float() / temp, -1) for name, g in batch.hidden.gates.items()}
        yield "", losses.load_balance(log_gates, batch.model.tree, batch.mask, batch.across)


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
    "switch": switch,
    "next_tokens": next_tokens,
    "tether": tether,
    "head_lb": head_balance,
    "head_entropy": head_entropy,
}
