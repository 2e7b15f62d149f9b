"""Find the first tensor with NaN or infinite values: after a failed step, and before anything is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import ValidationError


class NonFiniteError(ValidationError):
    """A loss, gradient, weight or moment became infinite or NaN."""


def first_bad_tensor(model: nn.Module, rerun: Callable[[], dict[str, Tensor]]) -> str:
    """Describe the first tensor that is not finite, in the order in which bad values spread.

    rerun: computes the loss terms of the failing batch again, while hooks check every module's output.
    """
    return bad_parameter(model) or bad_output(model, rerun) or bad_gradient(model) or "the total gradient norm"


def first_bad_number(
    model: nn.Module, optimizer: torch.optim.Optimizer, rerun: Callable[[], dict[str, Tensor]]
) -> str | None:
    """Describe the first tensor that makes a checkpoint useless; None where all weights and moments of the optimizer
    are finite, and `rerun`, which runs the model as it is deployed, meets finite numbers only."""
    return bad_parameter(model) or bad_moment(optimizer) or bad_output(model, rerun)


def bad_parameter(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    return None


def bad_moment(optimizer: torch.optim.Optimizer) -> str | None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    return f"the optimizer's {key} of {name}"
    return None


def bad_output(model: nn.Module, rerun: Callable[[], dict[str, Tensor]]) -> str | None:
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
    return None


def bad_gradient(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"gradient of {name}"
    return None
