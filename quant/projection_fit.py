"""The fit of projected heads: which P makes W (h + P h) predict what W_j h predicts.

W is an anchor's matrix [V, E], W_j that of a full head, h the hidden states of calibration text. All heads in front of
one anchor are fitted together, in two steps:

1. Least squares over the vocabulary: W P close to W_j - W. Each row counts by the probability that the deployed model
   gives its token on average, and a constant in all rows is free, because softmax ignores it. The result does not
   depend on h, and it is exact where W_j = W (I + P).
2. L-BFGS from there on the KL of the deployed mixture with full heads to that with projected ones, plus a ridge that
   keeps P near step 1 in directions that the text says little about.

Step 2 and the SVD for a rank work on X = A^1/2 P S^1/2, with A the weighted Gram matrix of W and S the second moment of
h. Lengths of X are about distances of logits, so that one ridge suits all directions. The factors are those of Martens
and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model.dmpt import ROWS_AT_ONCE
from training.progress import Bar

# Chosen on held-out text, for 1,536 and 6,144 tokens
RIDGE = 4.0  # nats on the whole text, for a change of X by sqrt(2)
DAMPING = 0.1  # added to S, as a share of its mean eigenvalue
PASSES = 64  # over the rows
SINGULAR = 1e-6  # added to A, which has no inverse where the rows of W do not span all directions


@dataclass(frozen=True, eq=False)
class Rows:
    """What the heads of one leaf get and predict: n rows, K candidates each, H heads that are to be projected."""

    heads: list[int]
    h: Tensor  # (n, E)
    candidates: Tensor | None  # (n, K), token ids; None: the whole vocabulary
    mass: Tensor  # (n,), probability of the candidates
    kept: Tensor  # (n, K), log of the other heads' part of the mixture among the candidates
    log_pi: Tensor  # (n, H)
    want: Tensor  # (n, K), log of the mixture among the candidates with full heads
    weights: Tensor  # (V,), sum of the deployed probabilities of all rows

    def kl(self, matrix: Tensor, projections: Tensor, rows: slice) -> Tensor:
        """Sum over some of the rows of KL(full || projected), with W (V, E) and each head's P (H, E, E)."""
        h, want = self.h[rows], self.want[rows]
        inputs = h + torch.einsum("hef,nf->hne", projections, h)
        if self.candidates is None:
            logits = inputs @ matrix.T
        else:
            logits = torch.einsum("nke,hne->hnk", matrix[self.candidates[rows]], inputs)
        parts = F.log_softmax(logits, -1) + self.log_pi[rows].T[..., None]
        got = torch.logsumexp(torch.cat([self.kept[None, rows], parts]), 0)
        return (self.mass[rows] * (want.exp() * (want - got)).sum(-1)).sum()


def fit(
    matrix: Tensor, heads: Mapping[int, Tensor], leaves: Sequence[Rows], rank: int | None
) -> dict[int, list[Tensor]]:
    """The projections of heads (V, E) in front of W (V, E), the anchor of all leaves: [P], or [down, up] of a rank."""
    start, gram = least_squares(matrix, list(heads.values()), torch.stack([rows.weights for rows in leaves]).sum(0))
    h = torch.cat([rows.h for rows in leaves]).double()
    a, a_inverse = roots(gram, SINGULAR)
    s, s_inverse = roots(h.T @ h / len(h), DAMPING)
    near = a @ start @ s  # (H, E, E)
    places = [[list(heads).index(j) for j in rows.heads] for rows in leaves]

    def divergence(x: Tensor) -> tuple[float, Tensor]:
        """KL of the whole text at X (H, E, E), and its slope. A slice of the rows at a time is in memory."""
        projections = (a_inverse @ x @ s_inverse).float().requires_grad_()
        total = 0.0
        for rows, place in zip(leaves, places, strict=True):
            for first in range(0, len(rows.h), ROWS_AT_ONCE):
                part = rows.kl(matrix, projections[place], slice(first, first + ROWS_AT_ONCE))
                part.backward()
                total += float(part.detach())
        assert projections.grad is not None
        return total, a_inverse @ projections.grad.double() @ s_inverse  # both roots are symmetric

    down, *up = refine([near] if rank is None else truncated(near, rank), near, divergence, len(h))
    parts = [a_inverse @ down @ s_inverse] if not up else [down @ s_inverse, a_inverse @ up[0]]
    return {j: [part[i].float().contiguous() for part in parts] for i, j in enumerate(heads)}


def least_squares(matrix: Tensor, heads: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Step 1, in float64: P of each head (H, E, E), and A (E, E).

    P and a constant c for each column minimise sum over v of weights[v] |(W P)[v] - (W_j - W)[v] - c|^2.
    """
    share, anchor = (weights / weights.sum()).double(), matrix.double()
    centred = anchor - share @ anchor
    weighted = share[:, None] * centred
    gram = centred.T @ weighted
    targets = torch.stack([weighted.T @ (head.double() - anchor) for head in heads])
    damped = gram + SINGULAR * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(damped, targets), gram


def roots(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """M^1/2 and M^-1/2 of a symmetric matrix to which a share of its mean eigenvalue is added."""
    sizes, vectors = torch.linalg.eigh(moment)
    sizes = (sizes.clamp(min=0) + damping * sizes.mean()).sqrt()
    return vectors * sizes @ vectors.T, vectors / sizes @ vectors.T


def truncated(x: Tensor, rank: int) -> list[Tensor]:
    """The nearest matrices of a rank to (H, E, E), as factors: [down (H, r, E), up (H, E, r)]."""
    u, sizes, v = torch.linalg.svd(x)
    root = sizes[:, :rank].sqrt()
    return [root[:, :, None] * v[:, :rank], u[:, :, :rank] * root[:, None]]


def refine(
    factors: Sequence[Tensor], near: Tensor, divergence: Callable[[Tensor], tuple[float, Tensor]], n: int
) -> list[Tensor]:
    """Step 2: the factors of X, last first, for the least divergence over n rows and ridge around `near`."""
    own = [factor.clone(memory_format=torch.contiguous_format).requires_grad_() for factor in factors]
    optimizer = torch.optim.LBFGS(own, max_iter=PASSES, max_eval=PASSES, line_search_fn="strong_wolfe")

    with Bar(total=PASSES, unit=" passes", desc="fit heads", leave=False) as bar:

        def loss() -> Tensor:
            optimizer.zero_grad()
            x = own[0] if len(own) == 1 else own[1] @ own[0]
            away = x.detach() - near
            total, slope = divergence(x.detach())
            x.backward((slope + RIDGE * away) / n)
            bar.update()
            bar.set_postfix_str(f"KL {total / n:.4f}")
            return torch.tensor((total + RIDGE / 2 * float(away.square().sum())) / n, dtype=x.dtype)

        optimizer.step(loss)
    return [factor.detach() for factor in own]
