"""Damage of quantized tensors: KL(float || quantized) of the model's predictions on calibration text.

For int8-dynamic, whose kernel rounds activations with one scale for all rows, they are rounded here as it does: for
each window of text, or in projections of heads for each chunk of rows. What other integer kernels round is left out.

The distribution is the deployed one: hard routing, fast-k and head_topk of the configuration. Everything before the
first changed block is computed once and cached, so measuring a change near the heads is cheap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.forms.form import Form
from quant.planning.activations import rounding
from quant.rules import EMBEDDING, PROJECTION, ROWS
from training.model.dmpt import ROWS_AT_ONCE, Hidden
from training.model.generation import DMPTForCausalLM

BLOCK = re.compile(r"(?:transformer|paths\.(\w+))\.h\.(\d+)\.")
Arrays = Mapping[str, NDArray[np.float32]]  # tensors by name, in the checkpoint's layout


class Damage:
    """The float model, its log-probs on `windows` [n, S], and the input of every block.

    Memory: 4 bytes times n * S * (vocabulary + blocks * width), in addition to the model.
    """

    @torch.inference_mode()
    def __init__(self, model: DMPTForCausalLM, windows: Tensor) -> None:
        self.model, self.windows = model.eval(), windows
        self.block_inputs: dict[tuple[str, int], Tensor] = {}  # (node, block) -> (n, S, E)
        self.clean = self._run(Hidden(), None)
        self.want = torch.cat(list(self._log_probs(self.clean)))  # (n * S, V)

    @torch.inference_mode()
    def of(self, forms: Mapping[str, Form]) -> float:
        """Mean KL in nats per token with tensors of the model, by name, stored so; the model is restored."""
        changed = {name: form.dequantize() for name, form in forms.items()}
        with self._with(changed), rounding(self.model, [n for n, form in forms.items() if form.rounds_activations]):
            start = self._first(changed)
            hidden = self.clean if start is HEADS else self._run(Hidden(dict(self.clean.leaves)), start)
            total, row = 0.0, 0
            for got in self._log_probs(hidden):
                want = self.want[row : row + len(got)]
                # benchmarks.quality.divergence.kl_divergence in torch: the rows are tensors, and are many
                total += float((want.exp() * (want - got)).sum(dtype=torch.float64))
                row += len(got)
        return max(total / row, 0.0)  # can be below 0 by rounding

    @contextmanager
    def _with(self, changed: Arrays) -> Iterator[None]:
        parameters = dict(self.model.named_parameters())
        kept = {name: parameters[name].data for name in changed}
        try:
            for name, array in changed.items():
                parameters[name].data = torch.from_numpy(np.ascontiguousarray(array))
            yield
        finally:
            for name, value in kept.items():
                parameters[name].data = value

    def _first(self, changed: Arrays) -> tuple[str, int] | None:
        """The first block that a change affects: (node, block); HEADS after all blocks, None for the embedding.

        Changes in several nodes start at the end of the trunk at the latest, the only node that they share.
        """
        places = {place_of(name) for name in changed}
        places.discard(HEADS)
        if not places:
            return HEADS
        if None in places:
            return None
        known = [place for place in places if place is not None]
        nodes = {node for node, _ in known}
        if len(nodes) == 1:
            return min(known, key=lambda place: place[1])
        trunk, *_ = self.model.tree.values()
        return min((place for place in known if place[0] == trunk.name), default=(trunk.name, trunk.stop - 1))

    def _run(self, out: Hidden, start: tuple[str, int] | None) -> Hidden:
        """model.hidden() from block `start`, into `out`; None starts at the embedding."""
        model, rows, first = self.model, dict[str, Tensor](), not self.block_inputs
        out.gates = {} if first else dict(self.clean.gates)
        for node in model.tree.values():
            if start is None and node.parent is None:
                x = model.embed(self.windows)
            elif start is not None and node.name == start[0]:
                x = self.block_inputs[start]
            elif node.parent in rows:
                x = rows[node.parent]
            else:
                continue
            for index, block in model.segment(node).h.items():
                if start is not None and node.name == start[0] and int(index) < start[1]:
                    continue
                if first:
                    self.block_inputs[node.name, int(index)] = x
                x = block(x, None, None)
            if node.children is None:
                out.leaves[node.name] = model.segment(node).ln_f(x)
            else:
                rows[node.name] = x
                out.gates[node.name] = model.gates[node.name](x)
        return out

    def _log_probs(self, hidden: Hidden) -> Iterator[Tensor]:
        """The deployed distribution of all rows, in chunks [m, V]."""
        model = self.model
        leaves = {leaf: h.flatten(0, 1)[None] for leaf, h in hidden.leaves.items()}
        n = self.windows.numel()
        routes = model.routes(hidden.gates).view(1, n) if hidden.gates else self.windows.new_zeros(1, n)
        for i in range(0, n, ROWS_AT_ONCE):
            rows = slice(i, i + ROWS_AT_ONCE)
            part = {leaf: h[:, rows] for leaf, h in leaves.items()}
            yield model.pick(part, routes[:, rows], model.config.fast_k)[0]


HEADS = ("heads", 0)  # not a block: the stage after all blocks


def place_of(name: str) -> tuple[str, int] | None:
    """Where a tensor is first used: (node, block), HEADS, or None for an embedding (which may also be a head).

    >>> place_of("paths.left.h.7.mlp.c_fc.weight"), place_of("transformer.h.0.attn.c_attn.weight")
    (('left', 7), ('root', 0))
    """
    if name != EMBEDDING and (ROWS.fullmatch(name) or PROJECTION.fullmatch(name)):
        return HEADS
    found = BLOCK.match(name)
    return (found[1] or "root", int(found[2])) if found else None
