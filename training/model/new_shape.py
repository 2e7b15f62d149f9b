"""What `init` and `convert` change in a model's shape, checked before torch is imported. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from training.errors import FieldError, InputError
from training.model.shape import FULL, PROJECTED, Shape, even_allocation, leaf_names

MOST_HEADS = 8  # the default never gives a model more heads than this, unless it has more leaves


@dataclass(frozen=True)
class NewShape:
    """What a GPT-2 is to become."""

    splits: list[int] | None = None  # block indices of the forks; None: half depth; []: none, several heads on one path
    head_allocation: dict[str, list[int]] | None = None  # head ids of each leaf
    heads: int | None = None  # or so many in all, shared out evenly; None: 4 a leaf, at most 8
    fast_k: int | None = None
    head_topk: int | None = None
    gate_hidden: int = Shape.gate_hidden
    tie: bool | None = None  # heads.0 is the embedding; None: as it was
    head_kind: str = FULL
    head_rank: int | None = None  # of projected heads; None: whole matrices
    shared_anchor: bool = False  # projected heads: one vocabulary matrix for all leaves
    next_tokens: int | None = None  # draft heads of each leaf; None: none


def init_fields(old: Shape, new: NewShape) -> dict[str, Any]:
    """The fields that training.model.init.init_from_gpt2 changes. Raises InputError as it does, and MemoryError for
    sizes that this machine cannot hold."""
    splits, head_allocation, gate_hidden = new.splits, new.head_allocation, new.gate_hidden
    if old.splits or old.n_vocab_heads != 1:
        raise InputError(
            f"this model already has splits {old.splits} and {old.n_vocab_heads} head(s): "
            "init starts from a GPT-2, or from a DMPT without splits and with one head"
        )
    if splits is None:
        if old.n_layer < 2:
            raise FieldError("a model of one block cannot be split: use {splits} none")
        splits = [old.n_layer // 2]
    if new.tie and not old.tie_word_embeddings:
        raise FieldError("this model's head is not tied to its embedding: leave {tie} out")
    if gate_hidden < 1:
        raise InputError(f"gate_hidden {gate_hidden} must be at least 1")
    each = old.n_embd * (old.vocab_size if new.head_kind == FULL else new.head_rank or old.n_embd)
    _check_memory("heads", 0 if new.heads is None else new.heads, each)
    _check_memory("gate_hidden", gate_hidden, old.n_embd)
    _check_memory("next_tokens", new.next_tokens or 0, old.n_embd * old.n_embd)
    if head_allocation is None:
        leaves = leaf_names(splits, old.n_layer)
        head_allocation = even_allocation(leaves, default_heads(len(leaves)) if new.heads is None else new.heads)
    return {
        "splits": splits,
        "head_allocation": head_allocation,
        "gate_hidden": gate_hidden,
        "head_topk": new.head_topk,
        "fast_k": new.fast_k,
        "tie_word_embeddings": old.tie_word_embeddings if new.tie is None else new.tie,
        "head_kind": new.head_kind,
        "head_rank": new.head_rank,
        "shared_anchor": new.shared_anchor,
        "next_tokens": new.next_tokens or 0,
    }


def check_init(old: Shape, new: NewShape) -> Shape:
    """The shape of the model that init_from_gpt2 would build. Raises as init_fields, and for fields that do not fit."""
    return Shape.of(vars(old) | init_fields(old, new))


def projected_fields(old: Shape, rank: int | None) -> dict[str, Any]:
    """The fields that change when full heads become projected ones of a rank (None: whole matrices), without a shared
    anchor. Raises InputError when the model has no head that could be projected, or one that two anchors would need."""
    if old.head_kind == PROJECTED:
        raise InputError("this model's heads are already projected")
    if rank is not None and not 1 <= rank <= old.n_embd:
        raise FieldError("{head_rank} {} must be from 1 to the model's width {}", rank, old.n_embd)
    fields = {"head_kind": PROJECTED, "head_rank": rank, "shared_anchor": False}
    new = Shape.of(vars(old) | fields)
    if not new.projected_heads:
        raise InputError(
            f"no head of this model can be projected: each is an anchor or head 0 ({old.head_allocation}); give a DMPT "
            "with several heads per leaf"
        )
    for j in new.projected_heads:
        anchors = {leaf: heads[0] for leaf, heads in old.head_allocation.items() if j in heads}
        if len(set(anchors.values())) > 1:
            of = ", ".join(f"{leaf}: head {anchor}" for leaf, anchor in anchors.items())
            raise InputError(
                f"head {j} is shared by leaves with different anchors ({of}), and one projection cannot serve both: "
                "give a model whose leaves share only heads with the same anchor"
            )
    return fields


def default_heads(n_leaves: int) -> int:
    """Four heads per leaf, but at most eight in all: each full head costs as much memory as the embedding.

    >>> [default_heads(n) for n in (1, 2, 4, 16)]
    [4, 8, 8, 16]
    """
    return max(n_leaves, min(MOST_HEADS, 4 * n_leaves))


def _check_memory(name: str, value: int, elements: int) -> None:
    """Raise MemoryError for more than this machine's memory: Linux would kill the process without a message."""
    needed = 4 * value * elements
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError(f"{name} {value} needs {needed / 1e9:.0f} GB")
