"""Trees to export, and planted faults in exported graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from dmpt_export.onnx.export import export_onnx
from quant.forms.blockwise import BlockwiseTensor
from runtime.model import Model
from tests.helpers.models import saved_model

TREES: dict[str, dict[str, Any]] = {
    "gpt2": {"splits": [], "heads": 1},
    "multi-head": {"splits": [], "heads": 3, "fast_k": 9, "head_topk": 2},
    "dual, all heads": {"splits": [2], "heads": 4},
    "dual, fast-k": {"splits": [2], "heads": 8, "fast_k": 16},
    "dual, one head each": {"splits": [1], "heads": 2, "fast_k": 5},
    "quad, fast-k": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1},
    "quad, all heads": {"splits": [2, 3], "heads": 4},
    "eight leaves": {"splits": [1, 2, 3], "heads": 8, "fast_k": 16},
    "shared heads": {
        "splits": [2], "heads": 2, "fast_k": 7, "head_allocation": {"left": [0, 1, 2], "right": [2, 0]},
    },
    "projected": {"splits": [2], "heads": 8, "fast_k": 16, "head_kind": "projected"},
    "projected, one anchor": {
        "splits": [1, 2], "heads": 8, "fast_k": 16, "head_kind": "projected", "shared_anchor": True, "head_rank": 8,
    },
    "projected, all heads": {"splits": [2], "heads": 4, "head_kind": "projected", "shared_anchor": True},
    "projected, one head each": {"splits": [1, 2], "heads": 4, "head_kind": "projected", "shared_anchor": True},
    "projected, unequal leaves": {
        "splits": [2], "heads": 2, "fast_k": 9, "head_kind": "projected", "shared_anchor": True,
        "head_allocation": {"left": [0], "right": [1, 2]},
    },
    "projected, one anchor, shared heads": {
        "splits": [2], "heads": 2, "fast_k": 7, "head_kind": "projected", "shared_anchor": True, "head_topk": 2,
        "head_allocation": {"left": [0, 1, 2], "right": [3, 1, 0]},
    },
    "projected, shared heads": {
        "splits": [2], "heads": 2, "fast_k": 7, "head_kind": "projected", "seed": 1,
        "head_allocation": {"left": [0, 1, 2], "right": [3, 1, 0]},
    },
    "odd sizes": {"splits": [1], "heads": 4, "fast_k": 3, "vocab_size": 53, "n_embd": 24, "n_head": 3, "n_layer": 3},
}  # fmt: skip


@contextmanager
def endless_models(root: Path, trees: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Model]]:
    """Random models by tree, without an end-of-text token, so that texts have the requested length."""
    loaded = {}
    for tree, fields in trees.items():
        saved_model(root / tree, **fields)
        export_onnx(root / tree, root / f"{tree} onnx", verify=False)
        loaded[tree] = runtime.load(root / f"{tree} onnx", threads=1)
        loaded[tree].ends = frozenset()
    yield loaded
    for model in loaded.values():
        model.close()


def wrong_scale(weight: Any) -> Any:
    """One block's scale 2 % off, or for a float tensor one row."""
    if isinstance(weight, BlockwiseTensor):
        return replace(weight, scales=wrong_scale(weight.scales))
    return weight * np.where(np.arange(len(weight)) == 3, 1.02, 1).astype(np.float32)[:, None]


def all_scales(weight: Any) -> Any:
    """For heads: rows that are never candidates, or heads the gate hardly weighs, cannot be judged by 64 tokens."""
    return (
        replace(weight, scales=weight.scales * np.float32(1.02))
        if isinstance(weight, BlockwiseTensor)
        else weight * 1.02
    )
