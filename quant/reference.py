"""A low-memory torch reference of a quantized checkpoint: at most one matrix in float at a time.

Weights stay quantized. A layer dequantizes its matrix when it runs; an embedding or a head only dequantizes the rows
it needs. This is slow: use it to check a few tokens, not to evaluate texts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.checkpoint import load_weights
from quant.forms.form import Form
from quant.forms.weights import form_of
from training.checkpoints.checkpoint import empty_model
from training.checkpoints.folder import Source
from training.model.generation import DMPTForCausalLM

ROWS = 4096  # rows of a head multiplied at a time


class StoredLayer(nn.Module):
    """A block's layer, x W + b, with W [in, out] in the checkpoint."""

    def __init__(self, weight: Form, bias: Tensor) -> None:
        super().__init__()
        self.stored = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ torch.from_numpy(self.stored.dequantize()) + self.bias


class StoredRows(nn.Module):
    """An embedding (called with ids) or a head (called with hidden rows; `weight[ids]` are some of its rows)."""

    def __init__(self, weight: Form) -> None:
        super().__init__()
        self.stored = weight

    @property
    def weight(self) -> StoredRows:
        return self

    def __getitem__(self, ids: Tensor) -> Tensor:  # (...) -> (..., E)
        rows = self.stored.rows(ids.reshape(-1).numpy())
        return torch.from_numpy(rows).view(*ids.shape, -1)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return self[x]
        n = self.stored.shape[0]
        slices = (slice(start, start + ROWS) for start in range(0, n, ROWS))
        return torch.cat([x @ torch.from_numpy(self.stored.rows(rows)).T for rows in slices], dim=-1)


def low_memory_model(source: Source) -> DMPTForCausalLM:
    """The model of quant.checkpoint.dequantized_model with bit-identical weights; raises the same errors."""
    config, weights = load_weights(source)
    model = empty_model(config)
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        parent_path, _, child = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        form = form_of(weight)
        if form.is_float:
            if not isinstance(getattr(parent, child), StoredLayer):  # StoredLayer already has its bias
                setattr(
                    getattr(parent, child), kind, nn.Parameter(torch.from_numpy(form.dequantize()), requires_grad=False)
                )
        elif form.transposed:
            bias = form_of(weights[f"{path}.bias"]).dequantize()
            setattr(parent, child, StoredLayer(form, torch.from_numpy(bias)))
        else:
            _put(parent, child, StoredRows(form))
    if config.tie_word_embeddings:
        _tie(model)
    return model.eval()


def _put(parent: nn.Module, child: str, module: nn.Module) -> None:
    if isinstance(parent, nn.ModuleList):
        parent[int(child)] = module
    else:
        setattr(parent, child, module)


def _tie(model: DMPTForCausalLM) -> None:
    embedding: nn.Module = model.transformer.get_submodule("wte")
    if isinstance(embedding, StoredRows):
        model.heads[0] = embedding
    else:
        model.heads[0].weight = model.transformer.wte.weight
