"""What torch gives, with dequantized weights and the exported configuration: where the gates choose, and with all
tokens sent to each node that they use too rarely."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmpt_export.check.drafts import Drafts
from dmpt_export.check.outcomes import Reference
from training.model.config import DMPTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from training.model.dmpt import Hidden
    from training.model.generation import DMPTForCausalLM

ENOUGH = 8  # single steps needed to check a node; if the gates send fewer tokens there, all are sent
EDGE = 1e-5  # nats: the anchor's K-th and next candidate closer than that may change places by rounding


def torch_references(
    source: Path, config: DMPTConfig, ids: np.ndarray, shortlist: np.ndarray | None = None
) -> dict[str, Reference]:
    """Whole-sequence torch evaluation with dequantized weights and the exported configuration, by node.

    First ROOT, where the gates choose. Then, parents first, each node reached so far by fewer than ENOUGH of the tokens
    that decoding feeds one by one: all tokens are sent there, and the gates below it choose. So every gate and every
    leaf is used in some run. The blocks run once; only routing and heads are computed again.
    """
    import torch

    from quant.reference import low_memory_model

    model = low_memory_model(source)
    model.config.head_topk, model.config.fast_k = config.head_topk, config.fast_k
    references: dict[str, Reference] = {}
    reached: Counter[str] = Counter()
    with torch.inference_mode():
        hidden = model.hidden(torch.from_numpy(ids)[None])
        for node in config.tree:
            if reached[node] < ENOUGH:
                references[node] = sent_to(model, hidden, node, shortlist)
                reached |= through_nodes(config, references[node].routes[prompt_length(len(ids)) :])
    return references


def sent_to(model: DMPTForCausalLM, hidden: Hidden, node: str, shortlist: np.ndarray | None = None) -> Reference:
    """The outcome when every token is sent to `node`; below it, the gates choose."""
    import torch

    turns = model.config.way(node)
    forced = {name: torch.eye(2)[turn].expand_as(hidden.gates[name]) for name, turn in turns}
    size = next(iter(hidden.leaves.values())).shape[:2]  # (1, S)
    routes = model.routes({**hidden.gates, **forced}) if hidden.gates else torch.zeros(size, dtype=torch.long)
    log_probs = model.pick(hidden.leaves, routes, model.config.fast_k)
    margins = torch.full(size, torch.inf)
    for name, logits in hidden.gates.items():
        if model.config.way(name)[: len(turns)] == turns:
            gaps = (logits[..., 1] - logits[..., 0]).abs()
            margins = margins.minimum(gaps / gaps.mean())
    edges = close_edges(model, hidden, routes)[0].numpy()
    drafts = Drafts.of(model, hidden, routes, shortlist)
    return Reference(
        log_probs[0].numpy(), routes[0].numpy(), edges=edges, margins=margins[0].numpy(), turns=turns, drafts=drafts
    )


def close_edges(model: DMPTForCausalLM, hidden: Hidden, routes: Tensor) -> Tensor:
    """Whether each row's last candidate and the next token are nearly equally likely under its anchor: bool [1, S]."""
    import torch

    config, close = model.config, torch.zeros_like(routes, dtype=torch.bool)
    for i, (leaf, h) in enumerate(hidden.leaves.items()):
        mine, (anchor, *others) = routes == i, config.head_allocation[leaf]
        if others and config.fast_k and config.fast_k < config.vocab_size and mine.any():
            log_p = torch.log_softmax(model.head_logits(leaf, anchor, h[mine]), -1)
            ends = log_p.topk(config.fast_k + 1, dim=-1).values[:, -2:]
            close[mine] = ends[:, 0] - ends[:, 1] < EDGE
    return close


def through_nodes(config: DMPTConfig, routes: np.ndarray) -> Counter[str]:
    """How many of the tokens with these leaf indices [S] go through each node."""
    counts: Counter[str] = Counter()
    for i, leaf in enumerate(config.leaves):
        for node in (*(name for name, _ in config.way(leaf)), leaf):
            counts[node] += int((routes == i).sum())
    return counts


def prompt_length(n: int) -> int:
    """How many of n tokens are fed at once before decoding continues one by one."""
    return max(1, n // 3)
