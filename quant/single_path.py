"""One leaf of a DMPT as a plain model with a single path: `onnx --only-path`. Tensors are renamed, never changed."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from quant.checkpoint import load_weights, write_quantized
from quant.forms.form import Form
from quant.forms.weights import Weight, Weights, form_of, quantized
from training.checkpoints.checkpoint import model_from_tensors, read_config, save_model
from training.checkpoints.files import resolve
from training.checkpoints.folder import Source
from training.errors import InputError
from training.model.config import DMPTConfig
from training.model.shape import FULL, ROOT, Shape


def save_single_path(source: Source, leaf: str, out: Path) -> None:
    """Write the checkpoint of one leaf, quantized if the source is.

    Raises InputError for an unusable source, and for a leaf that check_leaf refuses.
    """
    folder = resolve(source)
    config, weights = load_weights(folder)
    config.check_leaf(leaf)
    config, weights = single_path(config, weights, leaf)
    if quantized(weights):
        scheme = read_config(folder).quantization["scheme"]
        # without rules: those of the source are for the names of the whole model
        write_quantized(out, config, weights, scheme, {}, folder, source=folder)
    else:
        tensors = {name: torch.from_numpy(form_of(weight).dequantize()) for name, weight in weights.items()}
        save_model(model_from_tensors(config, tensors), out, folder, source=folder)


def single_path(config: DMPTConfig, weights: Weights, leaf: str) -> tuple[DMPTConfig, dict[str, Weight]]:
    """The leaf's own configuration and weights: its node becomes the root. It computes what `<leaf>_only` does.

    Raises InputError where that needs projected heads beside a full head that is not this path's anchor.
    """
    numbers, new, heads = renumbered(config, leaf), copy.deepcopy(config), config.head_allocation[leaf]
    new.tie_word_embeddings = config.tie_word_embeddings and numbers.get(0) == 0
    new.splits, new.domains = [], None
    new.head_allocation = {ROOT: [numbers[j] for j in heads]}
    projected = {numbers[j] for j in heads if j in config.projected_heads}
    if not projected:
        new.head_kind, new.head_rank, new.shared_anchor = FULL, None, False
    new.check()
    if set(new.projected_heads) != projected:
        full = next(j for j in heads if numbers[j] not in projected and numbers[j] in new.projected_heads)
        raise InputError(
            f"path {leaf} cannot be exported alone: its head {full} is the anchor of another path; export all paths"
        )
    renames = {"transformer.": "transformer.", f"head_gates.{leaf}.": f"head_gates.{ROOT}."}
    renames[f"draft_heads.{leaf}."] = f"draft_heads.{ROOT}."
    for node in config.tree.values():
        if node.parent is not None and (leaf == node.name or leaf.startswith(f"{node.name}_")):
            renames[f"paths.{node.name}."] = "transformer."
    renames |= {f"heads.{old}.": f"heads.{number}." for old, number in numbers.items()}
    names = {
        name: after + name.removeprefix(before)
        for name in weights
        for before, after in renames.items()
        if name.startswith(before)
    }
    moved = {after: weights[name] for name, after in names.items()}
    return new, {name: w.renamed(names) if isinstance(w, Form) else w for name, w in moved.items()}


def renumbered(shape: Shape, leaf: str) -> dict[int, int]:
    """The heads that a leaf needs -> their numbers in its own model.

    Head 0 stays so if the leaf uses it or projects onto its matrix; else the anchor takes its place.
    """
    heads = shape.head_allocation[leaf]
    first = [0] if shape.shared_anchor or 0 in heads else []
    return {j: i for i, j in enumerate(dict.fromkeys([*first, *heads]))}
