"""A sample of text with each token coloured by its path, and the head with the largest weight on hover."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.scorer import Scorer, pieces
from benchmarks.report import svg

MOST = 160  # tokens


def sample(scorer: Scorer, ids: NDArray[np.integer]) -> dict[str, Any] | None:
    """The text's first tokens: {"model", "leaves", "heads", "tokens": [[text, leaf index, head, weight] ...]}.

    "heads": whether head and weight (of the head with the largest weight in the token's leaf) are available; for an old
    export they are None. Returns None for a mode that does not choose leaves.
    """
    ids = ids[: min(MOST, scorer.context)]
    texts, tokens, told = iter(texts_of(scorer, ids)), [], True
    for piece in pieces(scorer, [(ids, len(ids))]):
        if piece.routes is None:
            return None
        heads: list[tuple[Any, Any]] = [(None, None)] * len(piece.routes)
        if (weights := piece.head_weights) is not None:
            heads = list(zip(weights.argmax(1).tolist(), weights.max(1).tolist(), strict=True))
        told &= weights is not None
        tokens += [[next(texts), int(leaf), *head] for leaf, head in zip(piece.routes, heads, strict=True)]
    return {"model": scorer.name, "leaves": scorer.leaves, "heads": told, "tokens": tokens}


def texts_of(scorer: Scorer, ids: NDArray[np.integer]) -> list[str]:
    """The text that each token adds; the bytes of a character count with its last token."""
    tokenizer, out, done = scorer.tokenizer, [], ""
    for i in range(1, len(ids) + 1):
        whole = tokenizer.decode([int(t) for t in ids[:i]], skip_special_tokens=False)
        whole = whole.rstrip("\ufffd")
        out.append(whole[len(done) :] if whole.startswith(done) else "")
        done = whole if whole.startswith(done) else done
    return out


def figure(found: dict[str, Any]) -> svg.Markup:
    """The sample as coloured text, with the path shares as its text alternative."""
    leaves, tokens = found["leaves"], found["tokens"]
    name = f"Paths of the first {len(tokens)} tokens in {found['model']}"
    spans = []
    for text, leaf, head, weight in tokens:
        title = f"path {leaves[leaf]}" + ("" if head is None else f", head {head}: weight {100 * weight:.0f} %")
        spans.append(svg.tag("span", text, class_="token", style=f"--path:{svg.colour(leaf + 1)}", title=title))
    counts = [sum(1 for token in tokens if token[1] == i) for i in range(len(leaves))]
    rows = [
        [leaf, str(n), f"{100 * n / len(tokens):.1f} %", heads_of(tokens, i)]
        for i, (leaf, n) in enumerate(zip(leaves, counts, strict=True))
    ]
    table = svg.table(["path", "tokens", "share", "heads with the largest weight"], rows, caption=name)
    note = "Hover over a token for its path and the head with the largest weight." if found["heads"] else (
        "Hover over a token for its path. Head weights are not available: re-export the model."
    )  # fmt: skip
    key = svg.legend(leaves, range(1, len(leaves) + 1))
    text = svg.tag("p", *spans, class_="routes", role="img", aria_label=f"{name}: {shares(leaves, counts)}")
    return svg.tag("figure", key, text, svg.tag("figcaption", note), table, aria_label=name)


def shares(leaves: list[str], counts: list[int]) -> str:
    return ", ".join(f"{leaf} {n}" for leaf, n in zip(leaves, counts, strict=True))


def heads_of(tokens: list[list[Any]], leaf: int) -> str:
    """
    >>> heads_of([["a", 0, 3, 0.5], ["b", 0, 3, 0.6], ["c", 0, 1, 0.9], ["d", 1, 4, 1.0]], 0)
    '3: 2, 1: 1'
    """
    counts: dict[int, int] = {}
    for _, own, head, _ in tokens:
        if own == leaf and head is not None:
            counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head}: {n}" for head, n in sorted(counts.items(), key=lambda kv: -kv[1])) or "-"
