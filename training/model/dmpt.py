"""The Dynamic Multiple Path Transformer in one file; read it from top to bottom.

    ids -> wte + wpe -> trunk blocks -+-> left  blocks -> ln_f -> heads of left  --+
                                      |                                            +-> log-probs
                                gate -+-> right blocks -> ln_f -> heads of right --+

Shapes: B batch, S tokens, E n_embd, V vocabulary, H heads of a leaf, K fast_k.
Every path sees the full context: its blocks run over all S tokens, and the gate only selects which
leaf's distribution counts for a token. `dmpt_export.graph` mirrors this file, in the same order.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.errors import InputError
from training.model.config import DMPTConfig
from training.model.key_values import KeyValues, causal_mask
from training.model.shape import ACTIVATIONS, GATE_HARD, MAX_PROB, RANDOM, Node

ROWS_AT_ONCE = 128  # rows per pick() call when scoring a text: each gathers K rows of every head (K * E floats)


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored [in, out]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, config: DMPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None, memory: KeyValues | None) -> Tensor:  # (B, S, E) -> (B, S, E)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        if memory is not None:
            k, v = memory.extend(k, v)
        dropout = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, config: DMPTConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.mlp_width)
        self.c_proj = Conv1D(config.mlp_width, config.n_embd)
        self.approximate = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, E) -> (B, S, E)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config: DMPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, memory: KeyValues | None) -> Tensor:  # (B, S, E) -> (B, S, E)
        x = x + self.attn(self.ln_1(x), mask, memory)
        return x + self.mlp(self.ln_2(x))


class Segment(nn.Module):
    """The blocks of one node, by their absolute index; a leaf also holds its final norm."""

    def __init__(self, config: DMPTConfig, node: Node) -> None:
        super().__init__()
        self.h = nn.ModuleDict({str(i): Block(config) for i in range(node.start, node.stop)})
        if node.children is None:
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def run(self, x: Tensor, mask: Tensor | None = None, memory: dict[str, KeyValues] | None = None) -> Tensor:
        """(B, S, E) -> (B, S, E). mask None: plain causal; memory: cached keys and values of each block."""
        for index, block in self.h.items():
            x = block(x, mask, memory[index] if memory else None)
        return x


class Trunk(Segment):
    def __init__(self, config: DMPTConfig, node: Node) -> None:
        super().__init__(config, node)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)


class ProjectedHead(nn.Module):
    """A head without a vocabulary matrix: h + P h goes into its leaf's. P [E, E], or of rank r."""

    def __init__(self, config: DMPTConfig) -> None:
        super().__init__()
        width, rank = config.n_embd, config.head_rank
        if rank is None:
            self.projection: nn.Module = nn.Linear(width, width, bias=False)
        else:
            parts = {"down": nn.Linear(width, rank, bias=False), "up": nn.Linear(rank, width, bias=False)}
            self.projection = nn.Sequential(OrderedDict(parts))

    def forward(self, h: Tensor) -> Tensor:  # (..., E) -> (..., E)
        out: Tensor = h + self.projection(h)
        return out


def gate_mlp(config: DMPTConfig, activation: nn.Module, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(config.n_embd, config.gate_hidden), activation, nn.Linear(config.gate_hidden, n_out))


@dataclass
class Hidden:
    """Output of the blocks for a batch, before any vocabulary head."""

    leaves: dict[str, Tensor] = field(default_factory=dict)  # leaf -> (B, S, E), after its ln_f
    gates: dict[str, Tensor] = field(default_factory=dict)  # split node -> (B, S, 2) logits, raw


class DMPT(PreTrainedModel):
    """GPT-2 with forking upper blocks and several vocabulary heads per leaf (docs/design.md, What the model computes).

    Source: S. Qian, "Dynamic Multiple Path Transformer" (2025); GPT-2: Radford et al. (2019).
    """

    config: DMPTConfig
    config_class = DMPTConfig
    base_model_prefix = "transformer"
    _tied_weights_keys = {"heads.0.weight": "transformer.wte.weight"}  # 5.x form

    def __init__(self, config: DMPTConfig) -> None:
        super().__init__(config)
        self.tree = config.tree
        trunk, *branches = self.tree.values()
        self.transformer = Trunk(config, trunk)
        self.paths = nn.ModuleDict({node.name: Segment(config, node) for node in branches})
        self.gates = nn.ModuleDict({name: gate_mlp(config, nn.Tanh(), 2) for name in config.split_nodes})
        projected = config.projected_heads
        self.heads = nn.ModuleList(
            ProjectedHead(config) if j in projected else nn.Linear(config.n_embd, config.vocab_size, bias=False)
            for j in range(config.n_vocab_heads)
        )
        self.head_gates = nn.ModuleDict(
            {
                leaf: gate_mlp(config, nn.GELU(), len(heads))
                for leaf, heads in config.head_allocation.items()
                if len(heads) > 1
            }
        )
        self.draft_heads = nn.ModuleDict(
            {
                leaf: nn.ModuleList(
                    nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(config.next_tokens)
                )
                for leaf in (config.leaves if config.next_tokens else ())
            }
        )
        self.post_init()

    # --- transformers conventions -------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.heads[0]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.heads[0] = value

    @classmethod
    def is_custom_code(cls) -> bool:
        """In custom code, Transformers 5 skips modules without parameters of their own: Block would not be scaled."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, (nn.Linear, Conv1D)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # GPT-2: residual projections shrink with depth
            for proj in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    # --- blocks and gates ---------------------------------------------------------------------

    def segment(self, node: Node) -> Segment:
        segment = self.transformer if node.parent is None else self.paths[node.name]
        assert isinstance(segment, Segment)
        return segment

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:  # (B, S) -> (B, S, E)
        if ids.shape[1] > self.config.n_positions:
            raise InputError(f"{ids.shape[1]} tokens do not fit the context of {self.config.n_positions}")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        return self.transformer.drop(self.transformer.wte(ids) + self.transformer.wpe(positions))

    def hidden(self, ids: Tensor, leaves: list[str] | None = None, real: Tensor | None = None) -> Hidden:
        """Run the blocks of every node above the wanted leaves (all by default) over all tokens, (B, S).

        real: (B, S), 0 where a token is (left) padding; None when all are real.
        """
        mask = None if real is None else causal_mask(real.bool())
        positions = None if real is None else (real.long().cumsum(1) - 1).clamp(min=0)
        wanted = leaves or self.config.leaves
        needed = {name for name in self.tree if any(leaf == name or leaf.startswith(f"{name}_") for leaf in wanted)}
        out = Hidden()
        rows: dict[str, Tensor] = {}
        for node in self.tree.values():
            if node.parent is None:
                x = self.embed(ids, positions)
            elif node.name in needed:
                x = rows[node.parent]
            else:
                continue
            x = self.segment(node).run(x, mask)
            if node.children is None:
                out.leaves[node.name] = self.segment(node).ln_f(x)
            else:
                rows[node.name] = x
                out.gates[node.name] = self.gates[node.name](x)
        return out

    def path_log_weights(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """log of the product of gate weights along each leaf's way, at gate_temp: leaf -> (B, S)."""
        log_w = {name: F.log_softmax(logits.float() / self.config.gate_temp, -1) for name, logits in gates.items()}
        return {leaf: sum_turns(log_w, turns) for leaf, turns in self.config.ways().items()}

    def routes(self, gates: dict[str, Tensor], leaves: list[str] | None = None) -> Tensor:
        """The leaf that each token takes, as an index into `leaves` (config.leaves): (B, S). A tie goes left.

        A turn that all given leaves share is always taken, whatever its gate's logits.
        """
        taken = {name: (logits[..., 1] > logits[..., 0]).long() for name, logits in gates.items()}
        ways = [turns for leaf, turns in self.config.ways().items() if leaf in (leaves or self.config.leaves)]
        shared = set.intersection(*(set(turns) for turns in ways))
        on_way = [
            torch.stack([taken[name] == turn for name, turn in turns if (name, turn) not in shared]).all(0)
            for turns in ways
        ]
        return torch.stack(on_way).long().argmax(0)

    def random_routes(self, ids: Tensor, last: int, seed: int = 0) -> Tensor:
        """A random leaf for each of the last tokens, without gates, all equally often: (B, S) -> (B, last).

        A hash of seed, token and position: the same in every run and batch, and independent of later tokens.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        mixed = (ids * 0x9E3779B1 + positions * 0x85EBCA77 + seed * 0xC2B2AE3D) & 0xFFFFFFFF
        for _ in range(2):  # a 32-bit finalizer, so that the high bits depend on every bit
            mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return ((mixed >> 16) * len(self.config.leaves) >> 16)[:, -last:]

    # --- heads --------------------------------------------------------------------------------

    def head_log_weights(self, leaf: str, h: Tensor) -> Tensor:  # (..., E) -> (..., H), log pi
        if leaf not in self.head_gates:
            return h.new_zeros((*h.shape[:-1], 1))
        logits = self.head_gates[leaf](h).float() / self.config.head_gate_temp
        if self.config.head_topk and self.config.head_topk < logits.shape[-1]:
            kept = logits.topk(self.config.head_topk, dim=-1).indices
            logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
        return F.log_softmax(logits, dim=-1)

    def head_input(self, j: int, h: Tensor) -> Tensor:
        """What head j's vocabulary matrix multiplies: (..., E) -> (..., E)."""
        head = self.heads[j]
        return head(h) if isinstance(head, ProjectedHead) else h

    def head_logits(self, leaf: str, j: int, h: Tensor) -> Tensor:  # (..., E) -> (..., V)
        logits: Tensor = self.heads[self.config.matrix_of(leaf, j)](self.head_input(j, h)).float()
        return logits

    def mixture(self, leaf: str, h: Tensor) -> Tensor:
        """log P_leaf, all heads scored fully: (..., E) -> (..., V)."""
        log_pi = self.head_log_weights(leaf, h)
        heads = self.config.head_allocation[leaf]
        if len(heads) == 1:
            return F.log_softmax(self.head_logits(leaf, heads[0], h), -1)
        parts = [F.log_softmax(self.head_logits(leaf, j, h), -1) + log_pi[..., i, None] for i, j in enumerate(heads)]
        return torch.logsumexp(torch.stack(parts), dim=0)

    def fast_mixture(self, leaf: str, h: Tensor, k: int) -> Tensor:
        """log P_leaf under fast-k, as deployed: (..., E) -> (..., V); sums to one.

        The anchor is scored fully; inside its K candidates the heads are mixed, each normalised over the
        candidates, and the mixture takes the anchor's candidate mass. Elsewhere the anchor's values stay.
        """
        anchor, *others = self.config.head_allocation[leaf]
        log_anchor = F.log_softmax(self.head_logits(leaf, anchor, h), -1)
        if not others:
            return log_anchor
        log_pi = self.head_log_weights(leaf, h)
        log_c, candidates = log_anchor.topk(k, dim=-1)  # (..., K)
        mass = torch.logsumexp(log_c, -1, keepdim=True)
        parts = [log_c - mass + log_pi[..., :1]]
        gathered, rows = -1, h
        for i, j in enumerate(others, start=1):
            if (matrix := self.config.matrix_of(leaf, j)) != gathered:  # projected heads share their leaf's
                gathered, rows = matrix, self.heads[matrix].weight[candidates]  # type: ignore[index]  # (..., K, E)
            logits = (rows @ self.head_input(j, h).unsqueeze(-1)).squeeze(-1).float()
            parts.append(F.log_softmax(logits, -1) + log_pi[..., i, None])
        return log_anchor.scatter(-1, candidates, mass + torch.logsumexp(torch.stack(parts), dim=0))

    def leaf_log_probs(self, leaf: str, h: Tensor, fast_k: int | None = None) -> Tensor:  # (..., E) -> (..., V)
        return self.fast_mixture(leaf, h, fast_k) if fast_k else self.mixture(leaf, h)

    def draft_input(self, leaf: str, i: int, h: Tensor) -> Tensor:
        """What the vocabulary matrix of the leaf's anchor multiplies to predict the (i + 2)-th token after a row:
        (..., E) -> (..., E)."""
        out: Tensor = h + self.draft_heads[leaf][i](h)  # type: ignore[index]
        return out

    def draft_head(self, leaf: str) -> nn.Module:
        """The head whose vocabulary matrix a leaf's draft heads multiply: its anchor's."""
        return self.heads[self.config.matrix_of(leaf, self.config.head_allocation[leaf][0])]

    def draft_matrix(self, leaf: str) -> Tensor:
        """That matrix, in a float model: (V, E)."""
        matrix: Tensor = self.draft_head(leaf).get_parameter("weight")
        return matrix

    def draft_logits(self, leaf: str, i: int, h: Tensor) -> Tensor:
        """Logits of the (i + 2)-th token after each row: (..., E) -> (..., V)."""
        logits: Tensor = self.draft_head(leaf)(self.draft_input(leaf, i, h)).float()
        return logits

    # --- the whole model ----------------------------------------------------------------------

    def log_probs(
        self,
        ids: Tensor,
        mode: str = GATE_HARD,
        fast_k: int | None = None,
        last: int | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """log P of the next token for the last `last` positions (all by default): (B, S) -> (B, last, V), fp32.

        mode: gate_hard (deployed), gate_soft, max_prob, random, or `<node>_only` (`left_only`, `right_right_only`):
        that leaf, or gate_hard below that node. fast_k: candidates of the anchor head; None scores every head
        fully. real: as in hidden(). Raises InputError for an unknown mode or a sequence longer than n_positions.
        """
        only = self.config.leaves_of_mode(mode)
        hidden = self.hidden(ids, only, real)
        keep = slice(-(last or ids.shape[1]), None)
        h = {leaf: x[:, keep] for leaf, x in hidden.leaves.items()}
        gates = {name: g[:, keep] for name, g in hidden.gates.items()}
        if len(h) == 1:
            leaf, x = next(iter(h.items()))
            return self.leaf_log_probs(leaf, x, fast_k)
        if mode == GATE_HARD or only:
            return self.pick(h, self.routes(gates, only), fast_k)
        if mode == RANDOM:
            return self.pick(h, self.random_routes(ids, last or ids.shape[1]), fast_k)
        parts = torch.stack([self.leaf_log_probs(leaf, x, fast_k) for leaf, x in h.items()])  # (L, B, S, V)
        if mode == MAX_PROB:
            best = parts.amax(-1).argmax(0)  # (B, S)
            return parts.gather(0, best[None, ..., None].expand(1, *parts.shape[1:]))[0]
        log_w = torch.stack(list(self.path_log_weights(gates).values()))
        return torch.logsumexp(parts + log_w[..., None], dim=0)

    def pick(self, h: dict[str, Tensor], routes: Tensor, fast_k: int | None) -> Tensor:
        """Each row's distribution from the leaf it was routed to; the other leaves' heads do not run."""
        out = routes.new_zeros((*routes.shape, self.config.vocab_size), dtype=torch.float32)
        for i, (leaf, x) in enumerate(h.items()):
            rows = routes == i
            if rows.any():
                out[rows] = self.leaf_log_probs(leaf, x[rows], fast_k)
        return out


def sum_turns(log_w: dict[str, Tensor], turns: list[tuple[str, int]]) -> Tensor:
    """Sum of the log gate weights along one way: each (B, S, 2) -> (B, S)."""
    return torch.stack([log_w[name][..., turn] for name, turn in turns]).sum(0)
