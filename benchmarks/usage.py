"""What a text makes a model use: which paths its tokens take, how often they switch, and what its heads weigh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.scorer import Scorer, TorchScorer

if TYPE_CHECKING:
    from training.model import DMPTForCausalLM

MOST = 4096  # tokens of the text that are looked at
WINDOW = 512  # tokens that see each other


def usage(scorer: Scorer, ids: NDArray[np.integer]) -> dict[str, Any]:
    """Of the first 4096 tokens of `ids` [N], in windows of 512 or the context:

    tokens, route_shares (leaf -> share of tokens), switch_share (of tokens on another path than the one before), and
    head_shares (leaf -> head -> mean weight on its tokens; None for an exported model, whose graph does not tell).
    """
    ids = ids[:MOST]
    size = min(WINDOW, scorer.context)
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    weights: dict[str, dict[int, float]] | None = None
    if isinstance(scorer, TorchScorer):
        routes, weights = of_torch(scorer.model, pieces)
    else:
        routes = [scorer.score(piece, len(piece))[1] for piece in pieces]
    taken = np.concatenate([route for route in routes if route is not None])
    counts = np.bincount(taken, minlength=len(scorer.leaves))
    pairs = sum(len(piece) - 1 for piece in pieces)
    switches = sum(int(np.count_nonzero(np.diff(route))) for route in routes if route is not None)
    return {
        "tokens": len(ids),
        "route_shares": {leaf: int(n) / len(ids) for leaf, n in zip(scorer.leaves, counts, strict=True)},
        "switch_share": switches / max(1, pairs),
        "head_shares": weights,
    }


def of_torch(
    model: DMPTForCausalLM, pieces: list[NDArray[np.integer]]
) -> tuple[list[NDArray[np.int64] | None], dict[str, dict[int, float]]]:
    """Routes of each piece, and each leaf's mean head weights over its tokens; no vocabulary head runs."""
    import torch

    config = model.config
    sums = {leaf: np.zeros(len(heads)) for leaf, heads in config.head_allocation.items()}
    counts = dict.fromkeys(config.leaves, 0)
    routes: list[NDArray[np.int64] | None] = []
    with torch.inference_mode():
        for piece in pieces:
            hidden = model.hidden(torch.as_tensor(piece.astype(np.int64), device=model.device)[None])
            taken = model.routes(hidden.gates)[0] if hidden.gates else torch.zeros(len(piece), dtype=torch.int64)
            for i, (leaf, h) in enumerate(hidden.leaves.items()):
                mine = h[0][taken == i]
                sums[leaf] += model.head_log_weights(leaf, mine).exp().sum(0).cpu().numpy()
                counts[leaf] += len(mine)
            routes.append(taken.cpu().numpy())
    shares = {
        leaf: {j: float(w) / max(1, counts[leaf]) for j, w in zip(heads, sums[leaf], strict=True)}
        for leaf, heads in config.head_allocation.items()
    }
    return routes, shares
