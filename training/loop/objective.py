"""The training loss of a batch of tokens, and its terms for monitoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.loop.cross_entropy import fast_k_gold, head_gold
from training.loop.losses import Across, alone, masked_mean
from training.loop.options import BEST, GATE_EXPECTED, TrainOptions, trained_leaves
from training.loop.selection import best_leaves
from training.loop.terms import TERMS, Batch, Taught
from training.model.dmpt import Hidden
from training.model.fields import tokens
from training.model.generation import DMPTForCausalLM
from training.model.shape import GATE_HARD, GATE_SOFT, MAX_PROB


@dataclass
class Loss:
    """The loss of one batch. Everything except `total` is detached."""

    total: Tensor  # (), the minimised loss: nll + sum of coefficient * term
    terms: dict[str, Tensor] = field(default_factory=dict)  # nll and the auxiliary terms, before coefficients: ()
    routes: Tensor | None = None  # (L,), share of tokens that gate_hard sends to each leaf
    switch_share: Tensor | None = None  # (), share of tokens that it sends to a different leaf from the token before
    heads: dict[str, Tensor] = field(default_factory=dict)  # leaf -> (H,), mean weight of its heads
    # Where every leaf is scored: `oracle`, nll if each token took its best leaf, and `foreseen`, the share that does:
    # (), (). With domains `as_taught.sum` and `.count`: tokens that take a leaf serving theirs, and all that have one.
    choices: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """The training loss of a model: `Objective(model, options)(ids)`.

    A term with coefficient 0 is not computed. Terms that need a choice are skipped where there is none: balance and
    gold-aux without splits, head terms for a single head, the tether for a model with only one head, further tokens
    without draft heads.
    """

    def __init__(
        self, model: DMPTForCausalLM, options: TrainOptions, across: Across = alone, domains: Sequence[str] = ()
    ) -> None:
        """domains: names of the text's domains, all in the model's configuration."""
        self.model, self.options, self.across = model, options, across
        self.taught = Taught.of(model.config, domains)
        self.only = trained_leaves(model.config, options)
        self.step = 0  # of the run, for coefficients that rise
        # The tether's teacher: a copy of the initial head 0, separate from the trained one.
        self.reference: Tensor | None = None
        if options.tether_coef and len(model.heads) > 1:
            self.reference = model.get_parameter("heads.0.weight").detach().clone()

    def __call__(self, ids: Tensor, mask: Tensor | None = None, domains: Tensor | None = None) -> Loss:
        """Loss of the tokens ids[:, 1:] (B, S) given the preceding ones: ids (B, S + 1), mask (B, S).

        domains: of each sequence, int64 (B,), an index of the text's domains or NONE.
        """
        labels = ids[:, 1:]
        hidden = self.model.hidden(ids[:, :-1], self.only)
        out = Loss(ids.new_zeros((), dtype=torch.float32))
        for name, coef, term in self.parts(hidden, labels, mask, self.joined(ids[:, :-1], mask), domains, out):
            out.terms[name] = term.detach()
            out.total = out.total + coef * term
        return out

    def parts(
        self,
        hidden: Hidden,
        labels: Tensor,
        mask: Tensor | None,
        joined: Tensor,
        domains: Tensor | None,
        out: Loss,
    ) -> Iterator[tuple[str, float, Tensor]]:
        """(name, coefficient, value) of the main loss and of every active auxiliary term."""
        options, mode = self.options, self.options.train_path_selection
        forked = len(hidden.leaves) > 1
        routes = self.model.routes(hidden.gates) if forked else None
        full = self.full_log_probs(hidden)
        # gate_hard scores a token only by its own leaf, unless gold-aux compares the leaves
        sparse = mode == GATE_HARD and not options.gold_aux_coef
        best = self.best(hidden, labels, mask, full, out) if mode == BEST else None
        gold = self.gold(hidden, labels, full, routes if sparse else best)
        same_text, detached = self.same_text(labels, mask), options.next_tokens_detached
        batch = Batch(
            self.model, hidden, mask, self.across, gold, log_w=None, joined=joined, labels=labels,
            same_text=same_text, detached=detached, domains=domains, taught=self.taught, best=best, full=full,
        )  # fmt: skip
        if forked and routes is not None:
            out.routes = masked_mean(F.one_hot(routes, len(hidden.leaves)).float(), mask)
            out.switch_share = masked_mean((routes[:, 1:] != routes[:, :-1]).float(), joined)
            batch.log_w = torch.stack(list(self.model.path_log_weights(hidden.gates).values()))
            if best is None and not sparse:
                out.choices = choices(gold.detach(), routes, mask)
            if domains is not None:
                out.choices |= self.as_taught(routes, domains, mask)
            taken = routes if best is None else best
            yield "nll", 1.0, masked_mean(-self.choose(gold, batch.log_w, taken, hidden), mask)
        else:
            yield "nll", 1.0, masked_mean(-gold[0], mask)
        batch.log_pi = self.head_log_pi(hidden)
        out.heads = {leaf: masked_mean(log_pi.detach().exp(), mask) for leaf, log_pi in batch.log_pi.items()}
        for name, term in TERMS.items():
            if coef := self.coefficient(name):
                for leaf, value in term(batch):
                    yield f"{name}{leaf}", coef, value

    @torch.no_grad()
    def best(
        self,
        hidden: Hidden,
        labels: Tensor,
        mask: Tensor | None,
        full: dict[str, tuple[Tensor, Tensor]],
        out: Loss,
    ) -> Tensor:
        """The leaf that is trained on each token, by the scores of all: (B, S)."""
        gold = self.gold(hidden, labels, full, None)
        out.choices = choices(gold, self.model.routes(hidden.gates), mask)
        return best_leaves(gold, mask, self.options.select, self.options.select_balance)

    def as_taught(self, routes: Tensor, domains: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Loss.choices: routes (B, S), domains (B,)."""
        right = self.taught.leaves.to(routes.device)[domains].gather(1, routes)
        known = (domains >= 0)[:, None].expand_as(routes)
        known = known if mask is None else known & mask
        return {"as_taught.sum": (right & known).float().sum(), "as_taught.count": known.float().sum()}

    def coefficient(self, name: str) -> float:
        """Of a term at the current step."""
        coef: float = getattr(self.options, f"{name}_coef")
        rise = self.options.next_tokens_rise
        return coef * min(1.0, (self.step + 1) / rise) if name == "next_tokens" and rise else coef

    def same_text(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Whether the token i + 2 after each position is in the batch, counts and belongs to its text: labels, mask
        (B, S) -> (N, B, S). No token from the next one on may be an end of text, except the target."""
        n, size = self.model.config.next_tokens, labels.shape[1]
        out = torch.zeros((n, *labels.shape), dtype=torch.bool, device=labels.device)
        within = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.clone()
        ends = torch.tensor(tokens(self.model.config.eos_token_id), device=labels.device)
        goes_on = torch.isin(labels, ends, invert=True)
        for ahead in range(1, min(n, size - 1) + 1):
            within = within[:, :-1] & goes_on[:, ahead - 1 : size - 1]
            if mask is not None:
                within &= mask[:, ahead:]
            out[ahead - 1, :, :-ahead] = within
        return out

    def joined(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Whether a token and the next one count and belong to one text: (B, S) -> (B, S - 1). An end of text begins
        the next text, as on a device, where it stands in front of the prompt."""
        ends = torch.tensor(tokens(self.model.config.eos_token_id), device=inputs.device)
        joined = torch.isin(inputs[:, 1:], ends, invert=True)
        return joined if mask is None else joined & mask[:, 1:] & mask[:, :-1]

    def head_log_pi(self, hidden: Hidden) -> dict[str, Tensor]:
        """leaf with several heads -> (B, S, H), with a gradient only where a term needs it."""
        wanted = bool(self.options.head_lb_coef or self.options.head_entropy_coef)
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            return {
                leaf: self.model.head_log_weights(leaf, h)
                for leaf, h in hidden.leaves.items()
                if leaf in self.model.head_gates
            }

    def full_log_probs(self, hidden: Hidden) -> dict[str, tuple[Tensor, Tensor]]:
        """leaf -> (log-probs of the reference, log-probs of the leaf), each (B, S, V); empty without a tether."""
        if self.reference is None:
            return {}
        out = {}
        for leaf, h in hidden.leaves.items():
            with torch.no_grad():
                reference = F.log_softmax(F.linear(h, self.reference).float(), -1)
            out[leaf] = (reference, self.model.mixture(leaf, h))
        return out

    def gold(
        self, hidden: Hidden, labels: Tensor, full: dict[str, tuple[Tensor, Tensor]], routes: Tensor | None
    ) -> Tensor:
        """log P_leaf of the labels: (B, S) -> (L, B, S). With `routes`, -inf for leaves that a token does not take."""
        rows = []
        for i, (leaf, h) in enumerate(hidden.leaves.items()):
            if leaf in full and not self.options.fast_k_loss:
                rows.append(full[leaf][1].gather(-1, labels[..., None])[..., 0])
            elif routes is None:
                rows.append(self.leaf_gold(leaf, h, labels))
            else:
                mine = routes == i
                row = torch.full(labels.shape, -torch.inf, device=labels.device)
                if mine.any():
                    row = row.masked_scatter(mine, self.leaf_gold(leaf, h[mine], labels[mine]))
                rows.append(row)
        return torch.stack(rows)

    def leaf_gold(self, leaf: str, h: Tensor, labels: Tensor) -> Tensor:
        """log P_leaf of given tokens, without storing (..., V): (..., E), (...) -> (...).

        Under the full mixture, or with fast_k_loss under fast-k as deployed.
        """
        model, heads = self.model, self.model.config.head_allocation[leaf]
        matrices = [model.get_parameter(f"heads.{model.config.matrix_of(leaf, j)}.weight") for j in heads]
        inputs = [model.head_input(j, h) for j in heads]
        log_pi = model.head_log_weights(leaf, h)
        if self.options.fast_k_loss and len(heads) > 1:
            assert model.config.fast_k
            return fast_k_gold(inputs, matrices, log_pi, labels, model.config.fast_k)
        gold = torch.stack([head_gold(x, weight, labels) for x, weight in zip(inputs, matrices, strict=True)], -1)
        return torch.logsumexp(gold + log_pi, dim=-1)

    def choose(self, gold: Tensor, log_w: Tensor, routes: Tensor, hidden: Hidden) -> Tensor:
        """log P of the labels under the path selection: (L, B, S), (L, B, S), (B, S) -> (B, S).

        gate_soft mixes the leaves by their gate weights, which trains the gates, but mixed leaves come to rely on each
        other. gate_expected weights their losses instead (Jacobs et al. 1991, "Adaptive Mixtures of Local Experts",
        first error function): every leaf must be good alone, as deployed, and a gate learns to predict which leaf is
        better. best trains the leaf that predicts its unit best. gate_hard and max_prob pick one leaf per token. A
        choice has no gradient, so the gates then learn from gold-aux.
        """
        if self.options.train_path_selection == GATE_EXPECTED:
            return (log_w.exp() * gold).sum(0)
        if self.options.train_path_selection == GATE_SOFT:
            return torch.logsumexp(log_w + gold, dim=0)
        if self.options.train_path_selection == MAX_PROB:
            with torch.no_grad():
                best = [self.model.mixture(leaf, h).amax(-1) for leaf, h in hidden.leaves.items()]
                routes = torch.stack(best).argmax(0)
        return gold.gather(0, routes[None])[0]


def choices(gold: Tensor, routes: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Loss.choices: gold (L, B, S), routes (B, S)."""
    best = gold.max(0)
    return {
        "oracle": masked_mean(-best.values, mask),
        "foreseen": masked_mean((best.indices == routes).float(), mask),
    }
