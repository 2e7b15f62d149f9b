"""Find the first tensor with NaN or infinite values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import ValidationError


class NonFiniteError(ValidationError):
    """A loss or gradient became infinite or NaN."""


def first_bad_tensor(model: nn.Module, rerun: Callable[[], dict[str, Tensor]]) -> str:
    """Describe the first tensor that is not finite, in the order in which bad values spread.

    rerun: computes the loss terms of the failing batch again, while hooks check every module's output.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                bad.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            terms = rerun()
    finally:
        for handle in hooks:
            handle.remove()
    if bad:
        return f"output of {bad[0]}"
    for name, term in terms.items():
        if not term.isfinite().all():
            return f"loss term {name}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"gradient of {name}"
    return "the total gradient norm"
