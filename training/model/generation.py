"""Exact hard routing at one path's cost, in torch: a readable version of what the exported graph does.

    tokens      0 ......................... length
    root        ==============================      done: all, always; its output rows are kept
    left        ==================------------      pending rows of the root: done[left] to done[root]
    right       ==============================

A node runs when any wanted position of any batch row is routed to a leaf under it; it then catches up on every
row it has not processed. Log-probs equal a one-shot evaluation, however the tokens are split into calls
(docs/design.md, Routing and catch-up).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.errors import InputError
from training.model.config import DMPTConfig
from training.model.dmpt import DMPT
from training.model.key_values import KeyValues, causal_mask
from training.model.shape import ROOT, Node


@dataclass
class PathCache:
    """Keys and values of every node, its number of processed tokens, and the rows that its children still need."""

    config: DMPTConfig
    memory: dict[str, dict[str, KeyValues]] = field(init=False)  # node -> block index -> keys and values
    done: dict[str, int] = field(init=False)  # node -> tokens processed
    rows: dict[str, Tensor] = field(default_factory=dict)  # split node -> its output rows (B, done, E)
    real: Tensor | None = None  # (B, length) bool: False where a position is padding

    def __post_init__(self) -> None:
        tree = self.config.tree
        self.done = dict.fromkeys(tree, 0)
        self.memory = {n.name: {str(i): KeyValues() for i in range(n.start, n.stop)} for n in tree.values()}

    @property
    def length(self) -> int:
        """Tokens fed so far, padding included."""
        return self.done[ROOT]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers' name for `length`."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the batch rows `beam_idx` (B,), for beam search."""
        self.rows = {name: rows[beam_idx] for name, rows in self.rows.items()}
        self.real = None if self.real is None else self.real[beam_idx]
        for blocks in self.memory.values():
            for block in blocks.values():
                block.select(beam_idx)


@torch.no_grad()
def advance(
    model: DMPT, ids: Tensor, cache: PathCache, last: int = 1, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Feed tokens (B, S); returns deployed log-probs (B, last, V) and leaf indices (B, last) of the last positions.

    real: (B, S) bool, False where a token is (left) padding; None when all are real. Raises InputError when the
    context is full.
    """
    config = model.config
    if cache.length + ids.shape[1] > config.n_positions:
        raise InputError(f"{cache.length + ids.shape[1]} tokens do not fit the context of {config.n_positions}")
    new = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    cache.real = new if cache.real is None else torch.cat([cache.real, new], dim=1)
    on = {ROOT: torch.ones_like(ids[:, -last:], dtype=torch.bool)}
    leaves: dict[str, Tensor] = {}
    for node in model.tree.values():
        if not on[node.name].any():
            on |= dict.fromkeys(node.children or (), on[node.name])
            continue
        rows = catch_up(model, node, ids, cache)
        if node.children is None:
            leaves[node.name] = model.segment(node).ln_f(rows[:, -last:])
            continue
        kept = cache.rows.get(node.name)
        cache.rows[node.name] = rows if kept is None else torch.cat([kept, rows], dim=1)
        logits = model.gates[node.name](rows[:, -last:])
        goes_right = logits[..., 1] > logits[..., 0]  # a tie goes left
        left, right = node.children
        on |= {left: on[node.name] & ~goes_right, right: on[node.name] & goes_right}
    routes = torch.stack([on[leaf] for leaf in config.leaves]).long().argmax(0)
    full = {leaf: leaves.get(leaf, torch.zeros(0)) for leaf in config.leaves}  # an unrouted leaf has no rows to pick
    return model.pick(full, routes, config.fast_k), routes


def catch_up(model: DMPT, node: Node, ids: Tensor, cache: PathCache) -> Tensor:
    """Run a node over all rows it has not processed; returns its output rows (B, R, E)."""
    assert cache.real is not None
    first = cache.done[node.name]
    if node.parent is None:
        positions = (cache.real.long().cumsum(1) - 1).clamp(min=0)[:, first:]
        x = model.embed(ids, positions)
    else:
        x = cache.rows[node.parent][:, first:]
    cache.done[node.name] = first + x.shape[1]
    return model.segment(node).run(x, causal_mask(cache.real, first), cache.memory[node.name])


class DMPTForCausalLM(DMPT, GenerationMixin):
    """A DMPT that works with Transformers' generate(): forward() with a PathCache, and passing that cache on."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """The deployed distribution (gate_hard, config.fast_k) in transformers' form: `logits` are log-probs.

        input_ids (B, S), attention_mask (B, past + S) with 0 at left padding; logits (B, S or logits_to_keep, V).
        `loss` is the mean NLL of `labels` (B, S), shifted, -100 ignored; training has its own losses.
        """
        size = input_ids.shape[1]
        if labels is not None or (attention_mask is None and past_key_values is None and not use_cache):
            log_probs = self.log_probs(
                input_ids, fast_k=self.config.fast_k, last=logits_to_keep or None, real=attention_mask
            )
            loss = None if labels is None else F.nll_loss(log_probs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return _output(loss=loss, logits=log_probs)
        cache = past_key_values if past_key_values is not None else PathCache(self.config)
        real = None if attention_mask is None else attention_mask[:, -size:]
        log_probs, _routes = advance(self, input_ids, cache, logits_to_keep or size, real)
        return _output(logits=log_probs, past_key_values=cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **others: Any
    ) -> dict[str, Any]:
        if past_key_values is None:  # generate() of Transformers 5 names it `cache`
            past_key_values = others.get("cache")
        seen = 0 if past_key_values is None else past_key_values.length
        inputs = {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, "use_cache": True}
        return inputs | {"attention_mask": attention_mask, "logits_to_keep": 1}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # paths lag behind each other: forward() makes its own cache

    @staticmethod
    def _reorder_cache(past_key_values: Any, beam_idx: Tensor) -> Any:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values


def _output(**fields: Any) -> CausalLMOutputWithPast:
    """Untyped: transformers annotates these fields with tensor types that torch does not produce."""
    return CausalLMOutputWithPast(**fields)


AutoConfig.register(DMPTConfig.model_type, DMPTConfig, exist_ok=True)
AutoModelForCausalLM.register(DMPTConfig, DMPTForCausalLM, exist_ok=True)
