"""Run an exported folder with the deployed runtime and compare it with torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from dmpt_export.check.drafts import draft_tokens
from dmpt_export.check.float_kernels import (
    force_turns,
    has_integer_kernels,
    read_graph,
    use_float_caches,
    use_float_kernels,
)
from dmpt_export.check.outcomes import Outcome, Reference, compare
from dmpt_export.check.proof import prove
from dmpt_export.check.reference import prompt_length, torch_references
from dmpt_export.check.standard import StandardModel, compare_others, compare_padded
from dmpt_export.check.stored_numbers import check_stored
from dmpt_export.check.tolerances import EXACT, KV_INT8, TOLERANCES, loosest
from dmpt_export.onnx.manifest import write_manifest
from dmpt_export.onnx.memory import give_back_memory
from runtime.proof import Tolerance
from training.model.config import DMPTConfig
from training.model.shape import ROOT

if TYPE_CHECKING:
    from runtime.model import Model

CHECKED_TOKENS = 96  # enough for switches, catch-up and a growing cache, yet under a second on small models
SEED = 20250


def check_export(
    folder: Path,
    manifest: dict[str, Any],
    source: Path,
    config: DMPTConfig,
    atol: float | None = None,
    draft_vocabulary: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compare the exported folder with torch, in whole sequences and step by step; returns the measured differences.

    Graphs with integer kernels are checked twice: first with float kernels, to float32 rounding, then as deployed. The
    first run checks the weights, whose small faults rounding would hide in the second; only the second one checks the
    scales of an int8 cache and the kernels themselves. Both also run with all tokens sent to each node that the gates
    use too rarely (torch_references). Finally every stored number is compared (dmpt_export.check.stored_numbers).
    The folder also gets a proof, by which devices check themselves (dmpt_export.check.proof). `atol` replaces the
    table's max_abs, if it has one. Raises ValidationError (exit code 4) with what differs, by how much and where.
    """
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, min(CHECKED_TOKENS, config.n_positions))
    shortlist = draft_vocabulary if config.next_tokens else None
    wants = torch_references(source, config, ids, shortlist)
    give_back_memory(folder)
    int8_cache = manifest["cache_dtype"] == "int8"
    activations = manifest["activation_dtype"]
    schemes = {tensor["scheme"] for tensor in manifest["quantization"]["tensors"].values()}
    line = TOLERANCES[KV_INT8] if int8_cache else loosest(activations, schemes)
    exact, tolerance = within(TOLERANCES[EXACT], atol), within(line, atol)
    path = folder / manifest["model"]
    graph, deployed = read_graph(path), path.read_bytes()
    results: dict[str, Any] = {"tokens": len(ids), "seed": SEED, "tolerance": vars(tolerance)}
    if activations == "float32" and (int8_cache or has_integer_kernels(graph)):
        use_float_kernels(graph)
        use_float_caches(graph)
        content, described = graph.SerializeToString(), with_float_caches(manifest)
        results["float_kernels"] = compare_graph(folder, described, content, ids, wants, exact, "with float kernels, ")
    results |= compare_graph(folder, manifest, deployed, ids, wants, tolerance)
    path.write_bytes(deployed)
    if "graphs" in manifest:
        results["graphs"] = compare_others(folder, manifest, ids.tolist(), wants[ROOT], tolerance)
    else:
        prove(folder, manifest, ids, wants[ROOT], tolerance)
        give_back_memory(folder)
    write_manifest(manifest, folder)
    results["numbers_compared"] = check_stored(path, source, shortlist)
    give_back_memory(folder)
    return results


def within(tolerance: Tolerance, atol: float | None) -> Tolerance:
    return tolerance if atol is None or tolerance.max_abs is None else replace(tolerance, max_abs=atol)


def with_float_caches(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the graph after use_float_caches()."""
    inputs, outputs = (
        [spec | {"dtype": "float32"} if spec["dtype"] == "int8" else spec for spec in manifest[part]]
        for part in ("inputs", "outputs")
    )
    return {**manifest, "cache_dtype": manifest["activation_dtype"], "inputs": inputs, "outputs": outputs}


def compare_graph(
    folder: Path,
    manifest: dict[str, Any],
    graph: bytes,
    ids: np.ndarray,
    wants: dict[str, Reference],
    tolerance: Tolerance,
    how: str = "",
) -> dict[str, Any]:
    """Run `graph`, described by `manifest`, in the folder: unchanged, and with its gates forced ("forced", by node).

    The last graph stays in the folder.
    """
    results = {}
    for node, want in wants.items():
        content, sent = graph, how
        if want.turns:
            changed = onnx.ModelProto.FromString(graph)
            force_turns(changed, want.turns)
            content, sent = changed.SerializeToString(), f"{how}with all tokens sent to {node}, "
        (folder / manifest["model"]).write_bytes(content)
        write_manifest(manifest, folder)
        results[node] = compare_runs(folder, manifest, ids.tolist(), want, tolerance, sent)
        give_back_memory(folder)
    return {**results.pop(ROOT), "forced": results}


def compare_runs(
    folder: Path, manifest: dict[str, Any], ids: list[int], want: Reference, tolerance: Tolerance, how: str
) -> dict[str, Any]:
    """Whole-sequence scoring and prefill-then-step decoding against torch; in the standard layout, padding too."""
    import runtime

    if "graphs" in manifest:
        with StandardModel(folder / manifest["model"]) as other:
            return {
                **compare_alone(other, ids, want, tolerance, how),
                **compare_padded(other, ids, want, tolerance, how),
            }
    with runtime.load(folder) as model:
        if want.drafts.gaps.size:
            want.drafts.compare(want.routes, *draft_tokens(model, ids), 1 - tolerance.top1, f"{how}draft heads")
        return compare_alone(model, ids, want, tolerance, how)


def compare_alone(
    model: Model | StandardModel, ids: list[int], want: Reference, tolerance: Tolerance, how: str
) -> dict[str, Any]:
    whole, stepped = Outcome(*model.score(ids)), decode_stepwise(model, ids)
    return {
        "whole": compare(want, whole, tolerance, f"{how}scored as a whole"),
        "stepwise": compare(want.part(stepped.first), stepped, tolerance, f"{how}decoded stepwise"),
    }


def decode_stepwise(model: Model | StandardModel, ids: list[int]) -> Outcome:
    """A prompt, then single tokens: the outcome from the prompt's last position on."""
    sequence, prompt = model.sequence(), prompt_length(len(ids))
    rows = [sequence.feed(ids[:prompt], last=1)] + [sequence.feed([token], last=1) for token in ids[prompt:]]
    return Outcome(np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows]), prompt - 1)
