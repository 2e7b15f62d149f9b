"""What int8-dynamic's kernel does to activations, in torch, for the damage that a plan measures."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.rules import EMBEDDING, TIED_HEAD
from training.model.generation import DMPTForCausalLM

LEVELS = 255  # steps between the least and the largest value


def rounded(x: Tensor) -> Tensor:
    """Activations [..., S, K] as a kernel sees them that runs S tokens together with one scale and zero point.

    Source: DynamicQuantizeLinear of the ONNX specification; com.microsoft.DynamicQuantizeMatMul rounds alike.
    """
    low = x.amin((-2, -1), keepdim=True).clamp(max=0)
    high = x.amax((-2, -1), keepdim=True).clamp(min=0)
    step = (high - low) / LEVELS
    step = step.where(step > 0, torch.ones_like(step))  # all zero
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, LEVELS) - zero) * step


@contextmanager
def rounding(model: DMPTForCausalLM, names: Collection[str]) -> Iterator[None]:
    """Inside, the linear layers and heads with these weights (checkpoint names) get rounded inputs."""

    def before(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (rounded(inputs[0]),)

    tied = model.config.tie_word_embeddings  # an embedding by itself is only looked up
    products = [TIED_HEAD if name == EMBEDDING else name for name in names if tied or name != EMBEDDING]
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in products]
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
