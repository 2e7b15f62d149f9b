"""A checkpoint as a benchmarks.quality.scorer.Scorer: training.model.dmpt in float32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality.scorer import Float, Ints, Piece, Window, family_of, tokenizer_of, weight_files
from training.model.dmpt import ROWS_AT_ONCE, Hidden
from training.model.generation import DMPTForCausalLM
from training.model.shape import GATE_HARD, RANDOM


class TorchScorer:
    """A model in one path mode."""

    def __init__(
        self,
        model: DMPTForCausalLM,
        folder: Path,
        threads: int | None,
        device: str,
        mode: str,
        name: str,
        scheme: str = "fp32",
    ) -> None:
        model.config.leaves_of_mode(mode)  # refuse an unknown mode first
        if threads:
            torch.set_num_threads(threads)
        self.model = model.to(device).eval()
        config = model.config
        self.mode, self.name, self.folder, self.scheme, self.device = mode, name, folder, scheme, device
        self.fast_k = config.fast_k
        self.head_allocation: Mapping[str, Sequence[int]] = config.head_allocation
        # only a mode that takes one leaf per token has head weights
        self.n_heads = config.n_vocab_heads if mode in (GATE_HARD, RANDOM) else 0
        self.context, self.vocab_size, self.leaves = config.n_positions, config.vocab_size, config.leaves
        self.family = family_of(len(config.leaves), config.n_vocab_heads)
        sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
        self.parameters = sum(sizes.values())
        self.parameters_touched_per_token = config.touched_per_token(sizes)
        self.size_bytes = sum(f.stat().st_size for f in weight_files(folder))
        self.tokenizer, self.end_of_text = tokenizer_of(folder, config.to_dict())

    def score(self, ids: NDArray[np.integer], last: int) -> tuple[Float, Ints | None]:
        found = list(self.pieces([(ids, last)]))
        routes = [piece.routes for piece in found if piece.routes is not None]
        return np.concatenate([piece.log_probs for piece in found]), np.concatenate(routes) if routes else None

    def pieces(self, windows: Sequence[Window]) -> Iterator[Piece]:
        """As the function pieces(). Windows of equal length go through the blocks together."""
        for _, together in itertools.groupby(windows, key=lambda window: len(window[0])):
            group = list(together)
            with torch.inference_mode():
                batch, lasts = self.batch([ids for ids, _ in group]), [last for _, last in group]
                yield from (self.picked if self.mode in (GATE_HARD, RANDOM) else self.whole)(batch, lasts)

    def followed(self, ids: NDArray[np.integer]) -> tuple[Ints, Float]:
        """Leaf [S] and head weights [S, heads] of every token of a window [S], as in pieces().

        Runs no vocabulary head. Only for modes that take one leaf per token.
        """
        with torch.inference_mode():
            hidden, routes = self.routed(self.batch([ids]))
            return routes[0].cpu().numpy(), self.head_weights(hidden.leaves, routes)

    def batch(self, windows: Sequence[NDArray[np.integer]]) -> Tensor:  # B times [S] -> (B, S)
        return torch.as_tensor(np.stack(windows).astype(np.int64), device=self.model.device)

    def whole(self, batch: Tensor, lasts: Sequence[int]) -> Iterator[Piece]:
        """(B, S) in a mode that mixes or compares leaves, which needs all their distributions at once."""
        out = self.model.log_probs(batch, self.mode, self.model.config.fast_k, max(lasts))
        for row, last in zip(out, lasts, strict=True):
            yield Piece(row[-last:].cpu().numpy(), None)

    def picked(self, batch: Tensor, lasts: Sequence[int]) -> Iterator[Piece]:
        """(B, S) in a mode that takes one leaf per token: one pass over the blocks, heads for a few rows at once."""
        model, size = self.model, batch.shape[1]
        hidden, routes = self.routed(batch)
        for i, last in enumerate(lasts):
            for start in range(size - last, size, ROWS_AT_ONCE):
                rows = slice(start, min(start + ROWS_AT_ONCE, size))
                h, taken = {leaf: x[i : i + 1, rows] for leaf, x in hidden.leaves.items()}, routes[i : i + 1, rows]
                log_probs = model.pick(h, taken, model.config.fast_k)
                yield Piece(log_probs[0].cpu().numpy(), taken[0].cpu().numpy(), self.head_weights(h, taken))

    def routed(self, batch: Tensor) -> tuple[Hidden, Tensor]:
        """Hidden rows of (B, S), and the leaf of each token (B, S)."""
        hidden = self.model.hidden(batch)
        chosen = hidden.gates and self.mode == GATE_HARD
        return hidden, self.model.routes(hidden.gates) if chosen else self.model.random_routes(batch, batch.shape[1])

    def head_weights(self, h: Mapping[str, Tensor], routes: Tensor) -> Float:
        """Head weights by head number: hidden rows (1, n, E) by leaf and the leaf of each (1, n) -> [n, heads]."""
        config = self.model.config
        out = np.zeros((routes.shape[1], config.n_vocab_heads), np.float32)
        for i, leaf in enumerate(config.leaves):  # may differ from the order of the allocation
            heads = config.head_allocation[leaf]
            mine = (routes[0] == i).cpu().numpy()
            weights = self.model.head_log_weights(leaf, h[leaf][0][routes[0] == i]).exp().float()
            out[np.ix_(mine, heads)] = weights.cpu().numpy()
        return out

    def close(self) -> None:
        del self.model
