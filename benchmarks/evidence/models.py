"""Models of GPT-2 small's shape with random weights: only their speed is meaningful, not their predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.evidence.plan import HEADS

Switching = Literal["natural", "never", "always"] | float  # a number: the share of tokens that switch, at random
SPLIT = 6
SPREAD = 5.0  # scale of the final norm: predictions as far from uniform as a trained model's, so that garbage shows
MARK = 0.1  # value in the one channel that encodes positions; the other entries of an embedding are about 0.03
SEED = 0
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class Shape:
    """The differences between the models of the speed table."""

    heads: int = 8
    switching: Switching = "natural"
    kind: str = "full"  # of benchmarks.evidence.plan.HEADS

    def __str__(self) -> str:
        return "-".join([str(self.heads), str(self.switching), *([self.kind] if self.kind != "full" else [])])


def make_gpt2(out: Path, **sizes: Any) -> None:
    """A Hugging Face GPT-2 folder; sizes: fields of GPT2Config that differ from GPT-2 small's."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(**NO_ENDS, **sizes))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(SPREAD)
    model.save_pretrained(out)


def make_dmpt(out: Path, shape: Shape, split: int = SPLIT, **sizes: Any) -> None:
    """A dual DMPT checkpoint whose gate follows `shape.switching`; sizes: fields of DMPTConfig that differ."""
    import torch

    from training.checkpoints.checkpoint import save_model
    from training.model.config import DMPTConfig
    from training.model.generation import DMPTForCausalLM
    from training.model.shape import even_allocation

    allocation = even_allocation(["left", "right"], shape.heads)
    torch.manual_seed(SEED)
    fields = {"fast_k": 256, **NO_ENDS, **HEADS[shape.kind], **sizes}
    model = DMPTForCausalLM(DMPTConfig(splits=[split], head_allocation=allocation, **fields))
    with torch.no_grad():
        for name in ("left", "right"):
            model.get_parameter(f"paths.{name}.ln_f.weight").mul_(SPREAD)
    rig(model, shape.switching)
    save_model(model, out)


def rig(model: Any, switching: Switching) -> None:
    """Let the position alone choose the path: always left, alternating at every token, at random, or at a given share
    of tokens a different one from the token before."""
    import torch

    n, random = model.config.n_positions, torch.Generator().manual_seed(SEED)
    if isinstance(switching, float):
        turns = (torch.rand(n, generator=random) < switching).cumsum(0) % 2
    else:
        coin = torch.randint(0, 2, (n,), generator=random)
        turns = {"never": torch.zeros(n), "always": torch.arange(n) % 2, "natural": coin}[switching]
    steer(model, {"root": turns})


def steer(model: Any, goes_right: Mapping[str, Any]) -> None:
    """Let the position alone decide each gate: 0 left or 1 right, [n_positions] for each split node.

    One channel of the residual stream per gate holds only a mark from the position embedding: no token and no block
    before the gate adds to it (zeros survive quantization), and the gate reads its sign. Each token costs as much
    computation on its path as in any model.
    """
    import torch

    with torch.no_grad():
        for channel, (name, turns) in enumerate(goes_right.items()):
            model.transformer.wte.weight[:, channel] = 0
            model.transformer.wpe.weight[:, channel] = MARK * (2 * turns - 1)
            above = [*[node for node, _ in model.config.way(name)][1:], name] if name != "root" else []
            for segment in (model.transformer, *(model.paths[node] for node in above)):
                for layer in (part for block in segment.h.values() for part in (block.attn.c_proj, block.mlp.c_proj)):
                    layer.weight[:, channel] = 0
                    layer.bias[channel] = 0
            first, second = model.gates[name][0], model.gates[name][2]
            for layer in (first, second):
                layer.weight.zero_()
                layer.bias.zero_()
            first.weight[0, channel] = 1
            second.weight[1, 0] = 1  # logits (0, tanh(mark)): right where the mark is above zero
