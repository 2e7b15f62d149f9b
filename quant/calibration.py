"""Calibration text, and what each layer sees of it.

Every path reads the whole context, so all tokens count for the layers of all paths; a head only sees the rows that
are routed to a leaf that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training import data
from training.checkpoint import Source, resolve
from training.config import DMPTConfig
from training.errors import InputError
from training.model import Conv1D, DMPTForCausalLM

TOKENS = 8192  # of calibration text by default
LONGEST = 512  # tokens of a calibration window
Visit = Callable[[str, Tensor], None]  # (tensor's name, the rows [n, K] that it is multiplied with)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The rows x a matrix was multiplied with, summed up."""

    count: int
    second_moment: NDArray[np.float64]  # sum of x x^T, [K, K]
    largest: NDArray[np.float32]  # max |x| of each input, [K]


def read_windows(text: str | Path, source: Source, config: DMPTConfig, tokens: int = TOKENS) -> Tensor:
    """The first `tokens` tokens of a text file, in windows: int64 [n, S], S at most LONGEST and the context.

    Raises InputError for a text of less than one window, of other tokens than the model's, or unreadable.
    """
    folder = resolve(source)
    tokenizer = data.load_tokenizer(folder)
    data.check_vocabulary(tokenizer, config.vocab_size, folder)
    ids = data.first_tokens(Path(text), tokenizer, data.end_of_text_id(tokenizer, config), tokens)
    length = min(LONGEST, config.n_positions, tokens)
    if len(ids) < length:
        raise InputError(f"{text} has {len(ids)} tokens, calibration needs {length} or more: give a longer text")
    whole = len(ids) // length * length
    return torch.from_numpy(ids[:whole].astype(np.int64)).view(-1, length)


@contextmanager
def watching(model: DMPTForCausalLM, visit: Visit) -> Iterator[None]:
    """Call `visit` for every block layer that runs inside the context."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Conv1D):
                stack.callback(module.register_forward_pre_hook(_hook(f"{name}.weight", visit)).remove)
        yield


def _hook(name: str, visit: Visit) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: visit(name, args[0].flatten(0, -2))


@torch.inference_mode()
def observe(model: DMPTForCausalLM, windows: Tensor, visit: Visit) -> None:
    """Run the model over calibration windows [n, S], calling `visit` for every block layer and every head."""
    config = model.config
    for window in windows:
        with watching(model, visit):
            hidden = model.hidden(window[None])
        routes = model.routes(hidden.gates)[0] if hidden.gates else window.new_zeros(len(window))
        for i, (leaf, h) in enumerate(hidden.leaves.items()):
            rows = h[0][routes == i]
            for j in config.head_allocation[leaf] if len(rows) else ():
                visit(config.head_name(j), rows)


def input_statistics(model: DMPTForCausalLM, windows: Tensor) -> dict[str, Inputs]:
    """Inputs of every matrix by name, from one pass of the float model over `windows` [n, S]."""
    sums: dict[str, list[Any]] = {}

    def add(name: str, x: Tensor) -> None:
        moment, largest = (x.T @ x).double(), x.abs().amax(0)
        if name not in sums:
            sums[name] = [len(x), moment, largest]
        else:
            seen = sums[name]
            seen[0], seen[1], seen[2] = seen[0] + len(x), seen[1].add_(moment), torch.maximum(seen[2], largest)

    observe(model, windows, add)
    return {name: Inputs(n, moment.numpy(), largest.numpy()) for name, (n, moment, largest) in sums.items()}
