"""Path usage of a model on a text: paths of its tokens, switches between them, and head weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.perplexity import head_shares, switch_share
from benchmarks.quality.scorer import Float, Ints, Scorer, pieces

MOST = 4096  # tokens of the text that are used
WINDOW = 512  # tokens of a window


def usage(scorer: Scorer, ids: NDArray[np.integer]) -> dict[str, Any]:
    """Path usage of the first 4096 tokens of `ids` [N], in windows of 512 or the context:

    tokens, route_shares (leaf -> share of tokens), switch_share (of tokens on a different path from the token
    before), and head_shares (leaf -> head -> mean weight on its tokens; None for an old export without such outputs).
    """
    ids = ids[:MOST]
    size = min(WINDOW, scorer.context)
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    routes, weights = zip(*(follow(scorer, window) for window in windows), strict=True)
    taken = np.concatenate(routes)
    mine = {leaf: taken == i for i, leaf in enumerate(scorer.leaves)}
    places = np.arange(len(ids))
    return {
        "tokens": len(ids),
        "route_shares": {leaf: int(on.sum()) / len(ids) for leaf, on in mine.items()},
        # windows do not adjoin
        "switch_share": switch_share(taken, places + places // size, ids == scorer.end_of_text),
        "head_shares": None if weights[0] is None else head_shares(scorer, np.concatenate(weights), mine),
    }


def follow(scorer: Scorer, window: NDArray[np.integer]) -> tuple[Ints, Float | None]:
    """The leaf of each token of a window [S], and the head weights [S, heads]; None: not available."""
    if hasattr(scorer, "followed"):
        found: tuple[Ints, Float] = scorer.followed(window)
        return found
    parts = [(piece.routes, piece.head_weights) for piece in pieces(scorer, [(window, len(window))])]
    routes, weights = ([part for part in own if part is not None] for own in zip(*parts, strict=True))
    assert routes, f"{scorer.name} is in mode {scorer.mode}, which does not choose leaves"
    return np.concatenate(routes), np.concatenate(weights) if weights else None
