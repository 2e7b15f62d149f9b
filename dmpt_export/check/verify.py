"""Run an exported folder with the deployed runtime and compare it with torch."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from benchmarks.quality.divergence import kl_divergence
from dmpt_export.check.drafts import Drafts, draft_tokens
from dmpt_export.check.float_kernels import (
    force_turns,
    has_integer_kernels,
    read_graph,
    use_float_caches,
    use_float_kernels,
)
from dmpt_export.check.stored_numbers import check_stored
from dmpt_export.check.tolerances import EXACT, KV_INT8, TOLERANCES, Tolerance, loosest
from dmpt_export.onnx.manifest import write_manifest
from training.errors import ValidationError
from training.model.config import DMPTConfig
from training.model.shape import ROOT

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.model import Model
    from training.model.dmpt import Hidden
    from training.model.generation import DMPTForCausalLM

CHECKED_TOKENS = 96  # enough for switches, catch-up and a growing cache, yet under a second on small models
ENOUGH = 8  # single steps needed to check a node; if the gates send fewer tokens there, all are sent
SEED = 20250
TIE = 1e-6  # nats: tokens closer than float32 can resolve both count as the top token
EDGE = 1e-5  # nats: the anchor's K-th and next candidate closer than that may change places by rounding


@dataclass(frozen=True)
class Outcome:
    """A model's outputs at consecutive positions from `first`."""

    log_probs: np.ndarray  # float32 [S, V]
    routes: np.ndarray  # int64 [S], leaf indices
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Reference(Outcome):
    """torch's outcome, and how close each position was to a different route or other candidates."""

    edges: np.ndarray  # bool [S]: the choice of candidates is within EDGE of another
    margins: np.ndarray  # [S]: logit gap of the closest gate over the mean gap; infinite where no gate chose
    turns: list[tuple[str, int]]  # (split node, 0 left or 1 right): the forced way of every token there
    drafts: Drafts  # of the same positions

    def since(self, first: int) -> Reference:
        rows = slice(first, None)
        own = {name: getattr(self, name)[rows] for name in ("log_probs", "routes", "edges", "margins")}
        return replace(self, **own, first=first)


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
    `atol` replaces the table's max_abs, if it has one. Raises ValidationError (exit code 4) with what differs, by how
    much and where.
    """
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, min(CHECKED_TOKENS, config.n_positions))
    shortlist = draft_vocabulary if config.next_tokens else None
    wants = torch_references(source, config, ids, shortlist)
    give_back_memory()
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
    write_manifest(manifest, folder)
    results["numbers_compared"] = check_stored(path, source, shortlist)
    give_back_memory()
    return results


def give_back_memory() -> None:
    """Release the memory of earlier steps, so that its fragments do not add to the peak of the next one."""
    gc.collect()  # a model's modules refer to each other
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc
        trim(0)


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
        results[node] = compare_runs(folder, ids.tolist(), want, tolerance, sent)
        give_back_memory()
    return {**results.pop(ROOT), "forced": results}


def compare_runs(folder: Path, ids: list[int], want: Reference, tolerance: Tolerance, how: str) -> dict[str, Any]:
    """Whole-sequence scoring and prefill-then-step decoding against torch."""
    import runtime

    with runtime.load(folder) as model:
        whole = Outcome(*model.score(ids))
        stepped = decode_stepwise(model, ids)
        if want.drafts.gaps.size:
            want.drafts.compare(want.routes, *draft_tokens(model, ids), 1 - tolerance.top1, f"{how}draft heads")
    return {
        "whole": compare(want, whole, tolerance, f"{how}scored as a whole"),
        "stepwise": compare(want.since(stepped.first), stepped, tolerance, f"{how}decoded stepwise"),
    }


def torch_references(
    source: Path, config: DMPTConfig, ids: np.ndarray, shortlist: np.ndarray | None = None
) -> dict[str, Reference]:
    """Whole-sequence torch evaluation with dequantized weights and the exported configuration, by node.

    First ROOT, where the gates choose. Then, parents first, each node reached so far by fewer than ENOUGH of the tokens
    that decoding feeds one by one: all tokens are sent there, and the gates below it choose. So every gate and every
    leaf is used in some run. The blocks run once; only routing and heads are computed again.
    """
    import torch

    from quant.reference import low_memory_model

    model = low_memory_model(source)
    model.config.head_topk, model.config.fast_k = config.head_topk, config.fast_k
    references: dict[str, Reference] = {}
    reached: Counter[str] = Counter()
    with torch.inference_mode():
        hidden = model.hidden(torch.from_numpy(ids)[None])
        for node in config.tree:
            if reached[node] < ENOUGH:
                references[node] = sent_to(model, hidden, node, shortlist)
                reached |= through_nodes(config, references[node].routes[prompt_length(len(ids)) :])
    return references


def sent_to(model: DMPTForCausalLM, hidden: Hidden, node: str, shortlist: np.ndarray | None = None) -> Reference:
    """The outcome when every token is sent to `node`; below it, the gates choose."""
    import torch

    turns = model.config.way(node)
    forced = {name: torch.eye(2)[turn].expand_as(hidden.gates[name]) for name, turn in turns}
    size = next(iter(hidden.leaves.values())).shape[:2]  # (1, S)
    routes = model.routes({**hidden.gates, **forced}) if hidden.gates else torch.zeros(size, dtype=torch.long)
    log_probs = model.pick(hidden.leaves, routes, model.config.fast_k)
    margins = torch.full(size, torch.inf)
    for name, logits in hidden.gates.items():
        if model.config.way(name)[: len(turns)] == turns:
            gaps = (logits[..., 1] - logits[..., 0]).abs()
            margins = margins.minimum(gaps / gaps.mean())
    edges = close_edges(model, hidden, routes)[0].numpy()
    drafts = Drafts.of(model, hidden, routes, shortlist)
    return Reference(
        log_probs[0].numpy(), routes[0].numpy(), edges=edges, margins=margins[0].numpy(), turns=turns, drafts=drafts
    )


def close_edges(model: DMPTForCausalLM, hidden: Hidden, routes: Tensor) -> Tensor:
    """Whether each row's last candidate and the next token are nearly equally likely under its anchor: bool [1, S]."""
    import torch

    config, close = model.config, torch.zeros_like(routes, dtype=torch.bool)
    for i, (leaf, h) in enumerate(hidden.leaves.items()):
        mine, (anchor, *others) = routes == i, config.head_allocation[leaf]
        if others and config.fast_k and config.fast_k < config.vocab_size and mine.any():
            log_p = torch.log_softmax(model.head_logits(leaf, anchor, h[mine]), -1)
            ends = log_p.topk(config.fast_k + 1, dim=-1).values[:, -2:]
            close[mine] = ends[:, 0] - ends[:, 1] < EDGE
    return close


def through_nodes(config: DMPTConfig, routes: np.ndarray) -> Counter[str]:
    """How many of the tokens with these leaf indices [S] go through each node."""
    counts: Counter[str] = Counter()
    for i, leaf in enumerate(config.leaves):
        for node in (*(name for name, _ in config.way(leaf)), leaf):
            counts[node] += int((routes == i).sum())
    return counts


def prompt_length(n: int) -> int:
    """How many of n tokens are fed at once before decoding continues one by one."""
    return max(1, n // 3)


def decode_stepwise(model: Model, ids: list[int]) -> Outcome:
    """A prompt, then single tokens: the outcome from the prompt's last position on."""
    sequence, prompt = model.sequence(), prompt_length(len(ids))
    rows = [sequence.feed(ids[:prompt], last=1)] + [sequence.feed([token], last=1) for token in ids[prompt:]]
    return Outcome(np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows]), prompt - 1)


def compare(want: Reference, got: Outcome, tolerance: Tolerance, how: str) -> dict[str, Any]:
    """Compare `got` with torch, routes first; returns the differences or raises ValidationError."""
    if not np.isfinite(got.log_probs).all():
        t, v = np.argwhere(~np.isfinite(got.log_probs))[0]
        raise ValidationError(f"{how}: log-prob of token {v} at position {got.first + t} is {got.log_probs[t, v]}")
    differs = want.routes != got.routes
    wrong = differs & (want.margins >= tolerance.gate_margin)
    if wrong.any():
        t = int(wrong.argmax())
        raise ValidationError(
            f"{how}: position {got.first + t} takes path {got.routes[t]}, torch takes {want.routes[t]} "
            f"(gate logits differ by {want.margins[t]:.2g} of the mean gap; up to {tolerance.gate_margin:g} is a tie)"
        )
    # A near-tie on the other path, or with another candidate, has a different distribution, which is not an error.
    same = ~differs & ~want.edges
    if not same.any():  # every position is at an edge: rounding cannot be told from a fault
        same = ~differs
    ties = {"near_ties": int(differs.sum()), "candidate_ties": int(want.edges.sum())}
    measured = {**distances(want.log_probs[same], got.log_probs[same]), **ties}
    limits = [
        ("largest log-prob difference", measured["max_abs_diff"], tolerance.max_abs),
        ("mean KL", measured["kl_mean"], tolerance.kl_mean),
        ("share of different top tokens", 1 - measured["top1_agreement"], 1 - tolerance.top1),
    ]
    for what, value, limit in limits:
        if limit is not None and value > limit:
            worst = got.first + int(np.flatnonzero(same)[np.abs(want.log_probs - got.log_probs)[same].max(-1).argmax()])
            raise ValidationError(
                f"{how}: {what} against torch is {value:.3g}, allowed {limit:.3g}; worst at position {worst}, "
                f"path {want.routes[worst - got.first]}"
            )
    return {**measured, "routes_equal": not bool(differs.any())}


def distances(want: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """How far two sets of log-probs [S, V] are apart; KL(want || got) in nats per position."""
    kl = kl_divergence(want, got)
    preferred = np.take_along_axis(want, got.argmax(-1)[:, None], axis=-1)[:, 0]
    return {
        "max_abs_diff": float(np.abs(want - got).max()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float((want.max(-1) - preferred <= TIE).mean()),
    }
