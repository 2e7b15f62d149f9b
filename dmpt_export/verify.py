"""Run an exported folder with the runtime that ships, and hold it against torch."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmpt_export.exact import has_integer_kernels, read_graph, use_float_caches, use_float_kernels
from dmpt_export.manifest import write_manifest
from dmpt_export.tolerances import EXACT, KV_INT8, TOLERANCES, Tolerance, loosest
from training.config import DMPTConfig
from training.errors import ValidationError

if TYPE_CHECKING:
    from runtime.model import Model

CHECKED_TOKENS = 96  # enough for switches, catch-up and a cache that grew, yet under a second on small models
SEED = 20250
TIE = 1e-6  # nats: tokens closer than float32 can tell are both the top one


@dataclass(frozen=True)
class Outcome:
    """What a model says about consecutive positions, the first of which is `first`."""

    log_probs: np.ndarray  # float32 [S, V]
    routes: np.ndarray  # int64 [S], leaf indices
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Reference(Outcome):
    """torch's outcome, with how close each position came to another route."""

    margins: np.ndarray  # [S]: gap of the closest gate's logits, over their mean gap

    def since(self, first: int) -> Reference:
        return Reference(self.log_probs[first:], self.routes[first:], first, margins=self.margins[first:])


def check_export(
    folder: Path, manifest: dict[str, Any], source: Path, config: DMPTConfig, atol: float | None = None
) -> dict[str, Any]:
    """Run the exported folder as a whole and step by step against torch; return what was measured.

    Integer kernels are checked twice: first the same graph with float kernels, to fp32 rounding, then the graph as
    deployed. `atol` replaces the table's max_abs where there is one. Raises ValidationError (exit code 4) saying
    what differs, by how much and where.
    """
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, min(CHECKED_TOKENS, config.n_positions))
    want = torch_reference(source, config, ids)
    gc.collect()  # the model is gone, its modules refer to each other
    int8_cache = manifest["cache_dtype"] == "int8"
    activations = manifest["activation_dtype"]
    schemes = {tensor["scheme"] for tensor in manifest["quantization"]["tensors"].values()}
    line = TOLERANCES[KV_INT8] if int8_cache else loosest(activations, schemes)
    exact, tolerance = within(TOLERANCES[EXACT], atol), within(line, atol)
    path = folder / manifest["model"]
    graph, deployed = read_graph(path), path.read_bytes()
    taken = [leaf for i, leaf in enumerate(manifest["leaves"]) if (want.routes == i).any()]
    results: dict[str, Any] = {"tokens": len(ids), "seed": SEED, "leaves": taken}
    if activations == "float32" and (int8_cache or has_integer_kernels(graph)):
        use_float_kernels(graph)
        use_float_caches(graph)
        path.write_bytes(graph.SerializeToString())
        write_manifest(with_float_caches(manifest), folder)
        results["float_kernels"] = compare_runs(folder, ids.tolist(), want, exact, "with float kernels, ")
        path.write_bytes(deployed)
        write_manifest(manifest, folder)
    return {**results, "tolerance": vars(tolerance), **compare_runs(folder, ids.tolist(), want, tolerance)}


def within(tolerance: Tolerance, atol: float | None) -> Tolerance:
    return tolerance if atol is None or tolerance.max_abs is None else replace(tolerance, max_abs=atol)


def with_float_caches(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the graph after use_float_caches()."""
    inputs, outputs = (
        [spec | {"dtype": "float32"} if spec["dtype"] == "int8" else spec for spec in manifest[part]]
        for part in ("inputs", "outputs")
    )
    return {**manifest, "cache_dtype": manifest["activation_dtype"], "inputs": inputs, "outputs": outputs}


def compare_runs(folder: Path, ids: list[int], want: Reference, tolerance: Tolerance, how: str = "") -> dict[str, Any]:
    """Whole-sequence scoring and prefill-then-step decoding against torch."""
    import runtime

    with runtime.load(folder) as model:
        whole = Outcome(*model.score(ids))
        stepped = decode_stepwise(model, ids)
    return {
        "whole": compare(want, whole, tolerance, f"{how}scored as a whole"),
        "stepwise": compare(want.since(stepped.first), stepped, tolerance, f"{how}decoded stepwise"),
    }


def torch_reference(source: Path, config: DMPTConfig, ids: np.ndarray) -> Reference:
    """One-shot torch evaluation with dequantized weights, under the configuration that is exported."""
    import torch

    from quant.lean import lean_model

    model = lean_model(source)
    model.config.head_topk = config.head_topk
    with torch.inference_mode():
        batch = torch.from_numpy(ids)[None]
        gates = model.hidden(batch).gates
        log_probs = model.log_probs(batch, fast_k=config.fast_k)[0].numpy()
        if not gates:
            return Reference(log_probs, np.zeros(len(ids), np.int64), margins=np.full(len(ids), np.inf))
        routes = model.routes(gates)[0].numpy()
        gaps = torch.stack([(g[..., 1] - g[..., 0]).abs()[0] for g in gates.values()])  # (gates, S)
        margins = (gaps / gaps.mean(1, keepdim=True)).amin(0).numpy()
    return Reference(log_probs, routes, margins=margins)


def decode_stepwise(model: Model, ids: list[int]) -> Outcome:
    """A prompt of a third, then single tokens: the outcome from the prompt's last position on."""
    sequence, prompt = model.sequence(), max(1, len(ids) // 3)
    rows = [sequence.feed(ids[:prompt], last=1)] + [sequence.feed([token], last=1) for token in ids[prompt:]]
    return Outcome(np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows]), prompt - 1)


def compare(want: Reference, got: Outcome, tolerance: Tolerance, how: str) -> dict[str, Any]:
    """Hold `got` against torch, routes first; what was measured, or ValidationError."""
    if not np.isfinite(got.log_probs).all():
        t, v = np.argwhere(~np.isfinite(got.log_probs))[0]
        raise ValidationError(f"{how}: log-prob of token {v} at position {got.first + t} is {got.log_probs[t, v]}")
    differs = want.routes != got.routes
    wrong = differs & (want.margins >= tolerance.gate_margin)
    if wrong.any():
        t = int(wrong.argmax())
        raise ValidationError(
            f"{how}: position {got.first + t} takes path {got.routes[t]} where torch takes {want.routes[t]} "
            f"(gate logits {want.margins[t]:.2g} of their usual gap apart; {tolerance.gate_margin:g} counts as a tie)"
        )
    same = ~differs  # a near-tie that went the other way is another distribution, not an error
    measured = {**distances(want.log_probs[same], got.log_probs[same]), "near_ties": int(differs.sum())}
    limits = [
        ("largest log-prob difference", measured["max_abs_diff"], tolerance.max_abs),
        ("mean KL", measured["kl_mean"], tolerance.kl_mean),
        ("share of other top tokens", 1 - measured["top1_agreement"], 1 - tolerance.top1),
    ]
    for what, value, limit in limits:
        if limit is not None and value > limit:
            worst = got.first + int(np.flatnonzero(same)[np.abs(want.log_probs - got.log_probs)[same].max(-1).argmax()])
            raise ValidationError(
                f"{how}: {what} against torch is {value:.3g}, allowed {limit:.3g}; worst at position {worst}, "
                f"path {want.routes[worst - got.first]}"
            )
    return {**measured, "routes_equal": bool(same.all())}


def distances(want: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """How far two sets of log-probs [S, V] are apart; KL(want || got) in nats per position."""
    # As benchmarks.base.kl_divergence, which this package must not import; here all log-probs are finite.
    kl = (np.exp(want) * (want - got)).sum(-1)
    preferred = np.take_along_axis(want, got.argmax(-1)[:, None], axis=-1)[:, 0]
    return {
        "max_abs_diff": float(np.abs(want - got).max()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float((want.max(-1) - preferred <= TIE).mean()),
    }
