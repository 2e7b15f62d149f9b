"""Compare the tokens that an export's draft heads choose with torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from training.errors import ValidationError

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.model import Model
    from training.model.dmpt import Hidden
    from training.model.generation import DMPTForCausalLM

TIE = 1e-4  # logits closer than that: float32 can swap them


@dataclass(frozen=True)
class Drafts:
    """torch's draft heads at consecutive positions."""

    shortlist: np.ndarray  # int64 [n], ascending: tokens that they choose among; empty without draft heads
    gaps: np.ndarray  # float32 [S, draft heads, n]: how far each of these is below the likeliest, in logits

    @classmethod
    def of(cls, model: DMPTForCausalLM, hidden: Hidden, routes: Tensor, shortlist: np.ndarray | None) -> Drafts:
        """routes: int64 (1, S), the leaf of each position."""
        import torch

        shortlist = np.empty(0, np.int64) if shortlist is None else shortlist
        heads = model.config.next_tokens if len(shortlist) else 0
        gaps = torch.zeros(routes.shape[1], heads, len(shortlist))
        for i, (leaf, h) in enumerate(hidden.leaves.items()):
            for head in range(heads):
                logits = model.draft_logits(leaf, head, h[routes == i])[:, torch.from_numpy(shortlist)]
                gaps[routes[0] == i, head] = logits.amax(-1, keepdim=True) - logits
        return cls(shortlist, gaps.numpy())

    def compare(self, want: np.ndarray, tokens: np.ndarray, routes: np.ndarray, allowed: float, how: str) -> None:
        """Raise ValidationError where an export chose other tokens [S, heads], at the same routes [S], beyond ties and
        the allowed share. want: torch's routes."""
        at = np.searchsorted(self.shortlist, tokens).clip(max=len(self.shortlist) - 1)
        if (unknown := self.shortlist[at] != tokens).any():
            raise ValidationError(f"{how}: token {tokens[unknown][0]} is not among those that they choose from")
        gaps = np.take_along_axis(self.gaps, at[..., None], axis=-1)[want == routes]
        share = float((gaps > TIE).mean()) if gaps.size else 0.0
        if share > allowed:
            raise ValidationError(f"{how}: {share:.1%} of the tokens differ from torch, allowed {allowed:.1%}")


def draft_tokens(model: Model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of draft heads [S, heads] and routes [S] at all positions, in runs of one token and of two."""
    sequence = model.sequence()
    tokens, routes = [], []
    for start in range(0, len(ids), 3):
        for piece in (ids[start : start + 1], ids[start + 1 : start + 3]):
            if piece:
                log_probs = np.empty((len(piece), model.vocab_size), np.float32)
                routes.append(sequence.run(piece, log_probs, drafting=True))
                tokens.append(sequence.drafts().copy())
    return np.concatenate(tokens), np.concatenate(routes)
