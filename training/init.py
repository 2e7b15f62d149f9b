"""GPT-2 -> DMPT without training: what the first step of training starts from.

Every path starts as a copy of the upper blocks, every head as a copy of GPT-2's, so the new model says what
GPT-2 said. Small seeded noise on the heads that are no anchor, and a small bias of the gates, break the
symmetry that would keep copies identical for ever.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import model_from_tensors
from training.config import DMPTConfig, even_allocation, leaf_names
from training.errors import InputError
from training.files import read_json
from training.gpt2 import COPIED
from training.model import DMPTForCausalLM

NOISE = 1e-3  # of the embedding's standard deviation: about 0.02 on a logit of GPT-2 small
GATE_BIAS = 0.25  # logits in favour of left, which starts as the unchanged GPT-2
HEAD_GATE_STD = 1e-3  # so small that mixing starts near uniform
MOST_HEADS = 8  # the default never gives a model more heads than this, unless it has more leaves


def init_from_gpt2(
    model: DMPTForCausalLM,
    splits: list[int] | None = None,
    head_allocation: dict[str, list[int]] | None = None,
    *,
    heads: int | None = None,
    fast_k: int | None = None,
    head_topk: int | None = None,
    noise: float = NOISE,
    gate_bias: float = GATE_BIAS,
    gate_hidden: int = 256,
    tie: bool | None = None,
    seed: int = 0,
) -> DMPTForCausalLM:
    """A DMPT in eval mode that starts from a model without splits and with one head (as load_model gives GPT-2).

    splits: block indices of the forks; None: half depth; []: none (several heads on one path).
    head_allocation: head ids of each leaf; or `heads` in all, shared out evenly (default: 4 a leaf, at most 8).
    noise: standard deviation added to heads that are no anchor, as a fraction of the embedding's own.
    gate_bias: what every gate starts with in favour of left, in logits; head gates start near uniform.
    tie: heads.0 is the embedding; None: as in `model`. Same arguments and seed: same tensors, bit by bit.
    Raises InputError when the fields do not fit each other or `model`.
    """
    config = init_config(model, splits, head_allocation, heads, fast_k, head_topk, gate_hidden, tie)
    if not noise >= 0 or noise == float("inf"):
        raise InputError(f"noise {noise} must be a number from 0 on")
    source = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        tensors[name] = source[name].clone()
    for node in config.tree.values():
        for i in range(node.start, node.stop):
            block = f"transformer.h.{i}."
            tensors |= {
                f"{node.prefix}.h.{i}.{name.removeprefix(block)}": tensor.clone()
                for name, tensor in source.items()
                if name.startswith(block)
            }
        if node.children is None:
            for part in ("weight", "bias"):
                tensors[f"{node.prefix}.ln_f.{part}"] = source[f"transformer.ln_f.{part}"].clone()
    random = torch.Generator().manual_seed(seed)
    tensors |= _heads(config, source["heads.0.weight"], noise, random)
    tensors |= _gates(config, gate_bias, random)
    if wild := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"{wild[0]} would hold NaN or infinity: use a smaller --noise and --gate-bias, or mend SOURCE")
    return model_from_tensors(config, tensors)


def init_config(
    model: DMPTForCausalLM,
    splits: list[int] | None,
    head_allocation: dict[str, list[int]] | None,
    heads: int | None,
    fast_k: int | None,
    head_topk: int | None,
    gate_hidden: int,
    tie: bool | None,
) -> DMPTConfig:
    """The configuration init_from_gpt2 gives its model. Raises InputError as it does."""
    old = model.config
    assert isinstance(old, DMPTConfig)
    if old.splits or old.n_vocab_heads != 1:
        raise InputError(
            f"this model already has splits {old.splits} and {old.n_vocab_heads} head(s): "
            "init starts from a GPT-2, or from a DMPT without splits and with one head"
        )
    if splits is None:
        if old.n_layer < 2:
            raise InputError("a model of one block cannot be split: use --splits none")
        splits = [old.n_layer // 2]
    if tie and not old.tie_word_embeddings:
        raise InputError("this model's head is not tied to its embedding: leave --tie out")
    if gate_hidden < 1:
        raise InputError(f"gate_hidden {gate_hidden} must be at least 1")
    _check_memory("heads", 0 if heads is None else heads, old.vocab_size * old.n_embd)
    _check_memory("gate_hidden", gate_hidden, old.n_embd)
    if head_allocation is None:
        leaves = leaf_names(splits, old.n_layer)
        head_allocation = even_allocation(leaves, default_heads(len(leaves)) if heads is None else heads)
    return DMPTConfig(
        **{name: getattr(old, name) for name in COPIED if name != "tie_word_embeddings"},
        splits=splits,
        head_allocation=head_allocation,
        gate_hidden=gate_hidden,
        head_topk=head_topk,
        fast_k=fast_k,
        tie_word_embeddings=old.tie_word_embeddings if tie is None else tie,
    )


def _check_memory(name: str, value: int, elements: int) -> None:
    """Raise MemoryError for what this machine can never hold: Linux would kill the process instead of saying so."""
    needed = 4 * value * elements
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError(f"{name} {value} needs {needed / 1e9:.0f} GB")


def read_head_allocation(path: str | os.PathLike[str]) -> dict[str, list[int]]:
    """Which head ids belong to which leaf, from JSON such as {"left": [0, 1], "right": [2, 3]}.

    Raises InputError when the file is no such object; whether it fits the tree is DMPTConfig's check.
    """
    allocation = read_json(Path(path))
    for leaf, heads in allocation.items():
        if not isinstance(heads, list) or any(type(j) is not int for j in heads):
            raise InputError(f"{path}: the heads of '{leaf}' must be a list of whole numbers, not {json.dumps(heads)}")
    return allocation


def default_heads(n_leaves: int) -> int:
    """Four heads a leaf, but no more than eight in all: each costs as much memory as the embedding.

    >>> [default_heads(n) for n in (1, 2, 4, 16)]
    [4, 8, 8, 16]
    """
    return max(n_leaves, min(MOST_HEADS, 4 * n_leaves))


def _heads(config: DMPTConfig, base: Tensor, noise: float, random: torch.Generator) -> dict[str, Tensor]:
    """Copies of GPT-2's head [vocab, E]; anchors exact, so the candidates and the first log-probs are GPT-2's."""
    exact = {heads[0] for heads in config.head_allocation.values()}
    std = noise * float(base.float().std())
    out = {}
    for j in range(config.n_vocab_heads):
        if j == 0 and config.tie_word_embeddings:
            continue  # it is the embedding
        drawn = torch.randn(base.shape, generator=random) if std else torch.zeros(())
        out[f"heads.{j}.weight"] = base.clone() if j in exact else base + std * drawn
    return out


def _gates(config: DMPTConfig, gate_bias: float, random: torch.Generator) -> dict[str, Tensor]:
    def two_layers(name: str, n_out: int, out_std: float, out_bias: Tensor) -> dict[str, Tensor]:
        def normal(n: int, m: int, std: float) -> Tensor:
            return std * torch.randn(n, m, generator=random)

        return {
            f"{name}.0.weight": normal(config.gate_hidden, config.n_embd, config.initializer_range),
            f"{name}.0.bias": torch.zeros(config.gate_hidden),
            f"{name}.2.weight": normal(n_out, config.gate_hidden, out_std),
            f"{name}.2.bias": out_bias,
        }

    out: dict[str, Tensor] = {}
    for node in config.split_nodes:
        out |= two_layers(f"gates.{node}", 2, config.initializer_range, torch.tensor([gate_bias, 0.0]))
    for leaf, heads in config.head_allocation.items():
        if len(heads) > 1:
            out |= two_layers(f"head_gates.{leaf}", len(heads), HEAD_GATE_STD, torch.zeros(len(heads)))
    return out
