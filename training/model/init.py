"""Initialise a DMPT from GPT-2, as the starting point of training.

Every path starts as a copy of the upper blocks, every head as a copy of GPT-2's, so the new model computes what GPT-2
computes. Small seeded noise on each head that is not an anchor, and a small gate bias, break the symmetry that would
otherwise keep the copies identical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.checkpoints.checkpoint import model_from_tensors
from training.checkpoints.record import FIELD, record_of
from training.errors import FieldError, InputError
from training.model.config import DMPTConfig
from training.model.fields import GPT2
from training.model.generation import DMPTForCausalLM
from training.model.new_shape import NewShape, init_fields

NOISE = 1e-3  # times the embedding's standard deviation: about 0.02 on a logit of GPT-2 small
PROJECTION = 10.0  # times the noise: size of P h over that of h, for a projected head that is no anchor
GATE_BIAS = 0.25  # logits in favour of left, which starts as the unchanged GPT-2
HEAD_GATE_STD = 1e-3  # small, so that mixing starts near uniform


def init_from_gpt2(
    model: DMPTForCausalLM,
    shape: NewShape | None = None,
    *,
    noise: float = NOISE,
    gate_bias: float = GATE_BIAS,
    seed: int = 0,
) -> DMPTForCausalLM:
    """Build a DMPT, in eval mode, from a model without splits and with one head (load_model() of a GPT-2).

    shape: what it becomes; None: the defaults of NewShape.
    noise: standard deviation of the noise on each head that is not an anchor, as a fraction of the embedding's. A
    projected head starts with P h ten times this fraction of h; an anchor that is projected, with P = 0.
    gate_bias: initial bias of every gate in favour of left, in logits; head gates start near uniform.
    Equal arguments and seed give equal tensors, bit by bit.
    Raises InputError when the fields do not fit each other or `model`.
    """
    old = model.config
    changed = init_fields(old, shape or NewShape())
    record = {FIELD: record_of(old, model.named_parameters()).to_json()}
    config = DMPTConfig(**{name: getattr(old, name) for name in GPT2} | changed | record)
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
    drafts = [config.draft_name(leaf, i) for leaf in config.leaves for i in range(config.next_tokens)]
    tensors |= {name: torch.zeros(config.n_embd, config.n_embd) for name in drafts}  # each has a target of its own
    if wild := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise FieldError(
            "{} would hold NaN or infinity: use a smaller {noise} and {gate_bias}, or repair {source}", wild[0]
        )
    return model_from_tensors(config, tensors)


def _heads(config: DMPTConfig, base: Tensor, noise: float, random: torch.Generator) -> dict[str, Tensor]:
    """Copies of GPT-2's head [vocab, E], or projections that hardly change its input. Anchors are exact, so candidates
    and first log-probs are GPT-2's."""
    exact = {
        j for leaf, (anchor, *_) in config.head_allocation.items() for j in (anchor, config.matrix_of(leaf, anchor))
    }
    std = noise * float(base.float().std())
    out: dict[str, Tensor] = {}
    for j in range(config.n_vocab_heads):
        if j == 0 and config.tie_word_embeddings:
            continue  # it is the embedding
        if j in config.projected_heads:
            out |= _projection(config, j, 0.0 if j in exact else PROJECTION * noise, random)
            continue
        drawn = torch.randn(base.shape, generator=random) if std else torch.zeros(())
        out[f"heads.{j}.weight"] = base.clone() if j in exact else base + std * drawn
    return out


def _projection(config: DMPTConfig, j: int, size: float, random: torch.Generator) -> dict[str, Tensor]:
    """A projected head: P h is about `size` times as large as h. With size 0 the last factor is zero, so that it learns
    from the first step on and the others from the second."""
    names, width = config.projection_names(j), config.n_embd
    inner = [width] * len(names) if config.head_rank is None else [width, config.head_rank]
    outer = [*inner[1:], width]
    sizes = [1.0] * (len(names) - 1) + [size]
    return {
        name: part / n_in**0.5 * torch.randn(n_out, n_in, generator=random)
        for name, n_in, n_out, part in zip(names, inner, outer, sizes, strict=True)
    }


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
