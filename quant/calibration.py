"""Calibration text and the inputs that each layer of the float model gets from it.

Every path reads the whole context, so all tokens count for the layers of all paths; a head only sees the rows
routed to a leaf that uses it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quant.text import TOKENS, read_ids
from training.checkpoints.checkpoint import load_model, read_config
from training.checkpoints.files import resolve
from training.checkpoints.folder import Source
from training.model.config import DMPTConfig
from training.model.dmpt import Conv1D
from training.model.generation import DMPTForCausalLM

JUDGED = 1024  # tokens scored to decide whether a text is foreign to the model
# For a matrix that is both embedding and head: weight of the error of its rows beside that of the logits, as if all
# inputs were independent and of mean size. With 0 the model loses more than with plain rounding.
LOOKED_UP = 1.0
Visit = Callable[[str, Tensor], None]  # (tensor name, input rows [n, K])


@dataclass(frozen=True, eq=False)
class Inputs:
    """Statistics of a matrix's input rows x."""

    count: int
    second_moment: NDArray[np.float64]  # sum of x x^T, [K, K]
    largest: NDArray[np.float32]  # max |x| of each input, [K]


@dataclass(frozen=True, eq=False)
class Calibration:
    """A text in windows, and what a quantized folder records about it."""

    windows: Tensor  # int64 [n, S]
    sha256: str  # of the file
    perplexity: float  # of the float model on the first tokens
    vocab_size: int

    @property
    def foreign(self) -> bool:
        """Whether the model does worse than guessing: such text does not show its layers' usual inputs."""
        return self.perplexity > self.vocab_size

    def as_dict(self) -> dict[str, Any]:
        """The record for a quantized folder."""
        return {"sha256": self.sha256, "tokens": self.windows.numel(), "perplexity": self.perplexity}


def read_calibration(
    text: str | Path, source: Source, tokens: int = TOKENS, ids: NDArray[np.int64] | None = None
) -> Calibration:
    """The first `tokens` tokens of a text file, judged by the float model; raises as load_model and read_ids.

    ids: what read_ids gave for this text and model, so that it is not tokenised again.
    """
    folder = resolve(source)
    windows = read_windows(text, folder, read_config(folder), tokens) if ids is None else torch.from_numpy(ids)
    model = load_model(folder)
    with open(text, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Calibration(windows, digest, perplexity(model, windows), model.config.vocab_size)


def read_windows(text: str | Path, source: Source, config: DMPTConfig, tokens: int = TOKENS) -> Tensor:
    """quant.text.read_ids as a tensor: int64 [n, S]."""
    return torch.from_numpy(read_ids(text, resolve(source), config, tokens))


@torch.inference_mode()
def perplexity(model: DMPTForCausalLM, windows: Tensor) -> float:
    """Perplexity of the deployed model on about the first JUDGED tokens of windows [n, S], S above 1."""
    judged = windows[: max(1, JUDGED // windows.shape[1])]
    losses = []
    for window in judged:
        log_probs = model.log_probs(window[None, :-1], fast_k=model.config.fast_k)[0]
        losses.append(-log_probs.gather(1, window[1:, None]).mean())
    return math.exp(min(float(torch.stack(losses).mean()), 700.0))


@contextmanager
def watching(module: nn.Module, prefix: str, visit: Visit) -> Iterator[None]:
    """Call `visit` for every linear layer under `module` that runs inside the context; names start with `prefix`."""
    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if isinstance(layer, Conv1D):
                stack.callback(layer.register_forward_pre_hook(_hook(f"{prefix}{name}.weight", visit)).remove)
        yield


def _hook(name: str, visit: Visit) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: visit(name, args[0].flatten(0, -2))


def observe(model: DMPTForCausalLM, windows: Tensor, wanted: Collection[str]) -> Iterator[dict[str, Inputs]]:
    """Yield the inputs of the `wanted` matrices: one block at a time in the order they run, then each head's.

    One pass of the model over `windows` [n, S]. At most one block's second moments are in memory at once; a head that
    no token is routed to has count 0.
    """
    ends: dict[str, Tensor] = {}  # raw output of inner nodes, all windows
    gates: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for node in model.tree.values():
        segment = model.segment(node)
        with torch.inference_mode():
            x = model.embed(windows) if node.parent is None else ends[node.parent]
        for index, block in segment.h.items():
            inputs, x = _run_block(block, f"{node.prefix}.h.{index}.", x, wanted)
            yield inputs
        with torch.inference_mode():
            if node.children is None:
                leaves[node.name] = segment.ln_f(x)
            else:
                ends[node.name], gates[node.name] = x, model.gates[node.name](x)
    yield from _head_inputs(model, gates, leaves, wanted)


class Sum:
    """Accumulates rows [n, K] into Inputs."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.moment = torch.zeros(width, width, dtype=torch.float64)
        self.largest = torch.zeros(width)

    def add(self, x: Tensor) -> None:
        if len(x):
            self.count += len(x)
            self.moment += x.T @ x
            self.largest = torch.maximum(self.largest, x.abs().amax(0))

    def inputs(self) -> Inputs:
        return Inputs(self.count, self.moment.numpy(), self.largest.numpy())


@torch.inference_mode()
def _run_block(block: nn.Module, prefix: str, x: Tensor, wanted: Collection[str]) -> tuple[dict[str, Inputs], Tensor]:
    """Inputs of a block's layers for rows [n, S, E], and the block's output."""
    sums: dict[str, Sum] = {}

    def visit(name: str, rows: Tensor) -> None:
        if name in wanted:
            sums.setdefault(name, Sum(rows.shape[-1])).add(rows)

    with watching(block, prefix, visit):  # one window at a time: the widest rows of all windows would fill the memory
        out = torch.cat([block(window, None, None) for window in x.split(1)])
    return {name: total.inputs() for name, total in sums.items()}, out


def _head_inputs(
    model: DMPTForCausalLM, gates: dict[str, Tensor], leaves: dict[str, Tensor], wanted: Collection[str]
) -> Iterator[dict[str, Inputs]]:
    """Inputs of each head's wanted matrices, one head at a time: the rows routed to the leaves that use it."""
    with torch.inference_mode():
        routed = {
            leaf: h[model.routes(gates) == i] if gates else h.flatten(0, 1)
            for i, (leaf, h) in enumerate(leaves.items())
        }
        yield from _matrix_inputs(model, routed, wanted)
        yield from _projection_inputs(model, routed, wanted)


def _matrix_inputs(
    model: DMPTForCausalLM, routed: dict[str, Tensor], wanted: Collection[str]
) -> Iterator[dict[str, Inputs]]:
    """Inputs of vocabulary matrices. routed: leaf -> rows [n, E].

    A vocabulary matrix gets them from the heads that multiply all of it: its own, anchors that project in front of it,
    and without fast-k all heads that do.
    """
    config = model.config
    users: dict[str, list[tuple[str, int]]] = {}  # matrix -> (leaf, head)
    for leaf, heads in config.head_allocation.items():
        for j in heads:
            if j not in config.projected_heads or j == heads[0] or not config.fast_k:
                users.setdefault(config.head_name(config.matrix_of(leaf, j)), []).append((leaf, j))
    for name in [name for name in users if name in wanted]:
        total = Sum(config.n_embd)
        for leaf, j in users[name]:
            total.add(model.head_input(j, routed[leaf]))
        if name == "transformer.wte.weight":
            total.moment.diagonal().add_(LOOKED_UP * total.moment.diagonal().mean())
        yield {name: total.inputs()}


def _projection_inputs(
    model: DMPTForCausalLM, routed: dict[str, Tensor], wanted: Collection[str]
) -> Iterator[dict[str, Inputs]]:
    """Inputs of projected heads and of draft heads. routed: leaf -> rows [n, E]."""
    config = model.config
    for j in config.projected_heads:
        x = torch.cat([routed[leaf] for leaf, heads in config.head_allocation.items() if j in heads])
        for name in config.projection_names(j):
            layer = model.get_submodule(name.removesuffix(".weight"))
            if name in wanted:
                total = Sum(x.shape[1])
                total.add(x)
                yield {name: total.inputs()}
            x = layer(x)
    for leaf, x in routed.items():
        drafts = [config.draft_name(leaf, i) for i in range(config.next_tokens)]
        if any(name in wanted for name in drafts):
            total = Sum(x.shape[1])
            total.add(x)
            yield {name: total.inputs() for name in drafts if name in wanted}
