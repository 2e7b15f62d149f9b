"""Exports are verified on every path, also where the gates send none of the checked tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmpt_export.onnx.export as export_module
import runtime
from dmpt_export.check import reference
from dmpt_export.check.float_kernels import force_turns, read_graph
from dmpt_export.check.reference import ENOUGH, prompt_length, sent_to
from dmpt_export.check.tolerances import EXACT, TOLERANCES
from dmpt_export.check.verify import SEED
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from dmpt_export.onnx.kv_cache import calibrate
from dmpt_export.onnx.manifest import write_manifest
from quant.checkpoint import load_weights, save_quantized
from runtime.manifest_file import PROOF_NAME
from tests.helpers.exports import all_scales, wrong_scale
from tests.helpers.models import random_model
from training.checkpoints.checkpoint import save_model
from training.errors import ValidationError
from training.model.generation import DMPTForCausalLM

DUAL: dict[str, Any] = {"splits": [2], "heads": 8, "fast_k": 16}
QUAD: dict[str, Any] = {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1}
INNERMOST = {"root": 0, "left": 0, "right": 0}  # as one_way() takes it: all go to left_left
FAR = 1e4  # a gate's bias that no token of these models outweighs


def one_way(out: Path, tree: dict[str, Any], **turns: int) -> Path:
    """A checkpoint whose gates, by node, never turn but 0 left or 1 right; those not named choose."""
    model = random_model(**tree)
    with torch.no_grad():
        for node, turn in turns.items():
            model.gates[node][2].bias[turn] = FAR
    save_model(model, out)
    return out


def stored(source: Path, scheme: str | None) -> Path:
    if scheme is None:
        return source
    save_quantized(source, source.with_name("quantized"), scheme=scheme)
    return source.with_name("quantized")


@pytest.mark.parametrize(
    ("tree", "turns", "scheme", "forced"),
    [
        (DUAL, {"root": 0}, None, ["right"]),
        (DUAL, {"root": 1}, "int8", ["left"]),
        (QUAD, INNERMOST, None, ["right", "left_right", "right_right"]),
        (QUAD, {"root": 1, "right": 1}, "int4", ["left", "left_left", "right_left"]),  # `left`'s own gate goes right
    ],
)
def test_paths_that_no_token_takes_are_checked_and_the_deployed_graph_is_published(
    tree: dict[str, Any], turns: dict[str, int], scheme: str | None, forced: list[str], tmp_path: Path
) -> None:
    source = stored(one_way(tmp_path / "source", tree, **turns), scheme)
    manifest = export_onnx(source, tmp_path / "onnx")
    graphs = [manifest["parity"], *([manifest["parity"]["float_kernels"]] if scheme else [])]
    for checked in graphs:
        assert list(checked["forced"]) == forced
        assert all(run["routes_equal"] for node in forced for run in checked["forced"][node].values())
    exact = max(run["max_abs_diff"] for node in graphs[-1]["forced"].values() for run in node.values())
    assert exact < TOLERANCES[EXACT].max_abs
    unchecked = export_onnx(source, tmp_path / "unchecked", verify=False)
    assert unchecked["parity"] is None
    assert manifest["files"].pop(PROOF_NAME)
    assert manifest["files"] == unchecked["files"]
    with runtime.load(tmp_path / "onnx", threads=1) as model:  # compares every file's sha256
        taken = [model.manifest.way(leaf) for leaf in set(model.routes(list(range(40))))]
    assert not any(node in way for node in forced for way in taken)


@pytest.mark.parametrize("tree", [{"splits": [], "heads": 1}, QUAD], ids=["gpt2", "quad"])
def test_paths_that_enough_tokens_take_are_not_run_again(tree: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(**tree)
    ids = checked_ids(model)
    with torch.no_grad():  # every gate halves the tokens that reach it
        for node, logits in model.hidden(torch.from_numpy(ids)[None]).gates.items():
            on_way = through(model, node, ids)[0, prompt_length(len(ids)) :]
            gaps = (logits[..., 1] - logits[..., 0])[0, prompt_length(len(ids)) :]
            model.gates[node][2].bias[0] += gaps[on_way].median() + 1e-3
    save_model(model, tmp_path / "source")
    assert export_onnx(tmp_path / "source", tmp_path / "onnx")["parity"]["forced"] == {}


def checked_ids(model: DMPTForCausalLM) -> np.ndarray:
    """The tokens of a check: for a context of 64, all of it."""
    return np.random.default_rng(SEED).integers(0, model.config.vocab_size, model.config.n_positions)


def through(model: DMPTForCausalLM, node: str, ids: np.ndarray) -> torch.Tensor:
    """Which of the tokens reach a node: bool [1, S]."""
    on_way = torch.ones(1, len(ids), dtype=torch.bool)
    gates = model.hidden(torch.from_numpy(ids)[None]).gates
    for name, turn in model.config.way(node):
        on_way &= (gates[name][..., 1] > gates[name][..., 0]) == bool(turn)
    return on_way


@pytest.mark.parametrize(("steps", "forced"), [(ENOUGH - 1, ["right"]), (ENOUGH, [])])
def test_a_few_tokens_do_not_speak_for_a_path(steps: int, forced: list[str], tmp_path: Path) -> None:
    """Only tokens decoded one by one count: a prompt routed there does not test the node's caches."""
    model = random_model(**DUAL)
    ids = checked_ids(model)
    prompt = prompt_length(len(ids))
    with torch.no_grad():
        logits = model.hidden(torch.from_numpy(ids)[None]).gates["root"][0]
        gaps = (logits[:, 1] - logits[:, 0])[prompt:].sort(descending=True).values
        model.gates["root"][2].bias[0] += (gaps[steps - 1] + gaps[steps]) / 2
        assert int(through(model, "right", ids)[0, prompt:].sum()) == steps
    save_model(model, tmp_path / "source")
    assert list(export_onnx(tmp_path / "source", tmp_path / "onnx")["parity"]["forced"]) == forced


@pytest.mark.parametrize(
    ("tree", "turns", "scheme", "tensor", "fault", "message"),
    [
        (DUAL, {"root": 0}, None, "paths.right.h.3.mlp.c_fc.weight", wrong_scale, "right, "),
        (DUAL, {"root": 0}, "int8", "paths.right.h.3.mlp.c_fc.weight", wrong_scale, "right, "),
        (DUAL, {"root": 1}, "int8", "heads.1.weight", all_scales, "left, "),
        (DUAL, {"root": 1}, None, "head_gates.left.2.bias", lambda bias: bias[::-1], "left, "),
        (QUAD, INNERMOST, None, "paths.right_right.h.3.attn.c_attn.weight", wrong_scale, "right_right, "),
        (QUAD, INNERMOST, "int8", "paths.right_right.h.3.attn.c_attn.weight", wrong_scale, "right_right, "),
        (QUAD, {"root": 0}, "int4", "gates.right.2.weight", lambda weight: weight[::-1], "right, .* takes path"),
    ],
)
def test_a_fault_where_no_token_goes_is_caught_and_nothing_is_left(
    tree: dict[str, Any], turns: dict[str, int], scheme: str | None, tensor: str, fault: Any, message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = stored(one_way(tmp_path / "source", tree, **turns), scheme)

    def damaged(folder: Path) -> Any:
        config, weights = load_weights(folder)
        return config, {**weights, tensor: fault(weights[tensor])}

    monkeypatch.setattr(export_module, "load_weights", damaged)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["onnx", str(source), str(tmp_path / "onnx")]) == 4
    kernels = "with float kernels, " if scheme else ""
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(f"{kernels}with all tokens sent to {message}", said)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    if scheme is None:  # for callers that insist
        assert main(["onnx", str(source), str(tmp_path / "onnx"), "--no-verify"]) == 0
        assert "not verified against torch" in capsys.readouterr().err


def test_wrong_scales_of_a_cache_that_no_token_fills_fail_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the deployed graph has them, so it is also run with forced gates."""
    source = one_way(tmp_path / "source", DUAL, root=0)

    def wrong(*args: Any) -> dict[str, np.ndarray]:
        return {name: s / 20 if "right" in name else s for name, s in calibrate(*args).items()}

    monkeypatch.setattr(export_module, "calibrate", wrong)
    assert main(["onnx", str(source), str(tmp_path / "onnx"), "--kv-cache", "int8"]) == 4
    assert not (tmp_path / "onnx").exists()


def test_the_command_names_the_paths_it_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stored(one_way(tmp_path / "source", DUAL, root=0), "int8")
    assert main(["onnx", str(source), str(tmp_path / "onnx")]) == 0
    said = capsys.readouterr().err
    assert "with all tokens sent there (right): within " in said
    assert "warning" not in said


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_forcing_takes_every_token_to_the_node_and_changes_nothing_else(target: str, tmp_path: Path) -> None:
    """Torch's `<node>_only` modes are the reference for both sides, however strongly a gate prefers the other one."""
    model = random_model(**QUAD)
    with torch.no_grad():
        for gate in model.gates.values():
            gate[2].weight *= 1e3
    save_model(model, tmp_path / "source")
    manifest = export_onnx(tmp_path / "source", tmp_path / "onnx", ExportOptions(target=target), verify=False)
    path = tmp_path / "onnx" / "model.onnx"
    deployed, ids = path.read_bytes(), torch.from_numpy(checked_ids(model))[None]
    for node in [*model.config.tree][1:]:
        with torch.inference_mode():
            want = sent_to(model, model.hidden(ids), node)
            same = model.log_probs(ids, mode=f"{node}_only", fast_k=model.config.fast_k)
        np.testing.assert_array_equal(want.log_probs, same[0].numpy())
        path.write_bytes(deployed)
        graph = read_graph(path)
        force_turns(graph, want.turns)
        path.write_bytes(graph.SerializeToString())
        write_manifest(manifest, tmp_path / "onnx")
        with runtime.load(tmp_path / "onnx", threads=1) as loaded:
            log_probs, routes = loaded.score(ids[0].tolist())
        if target == "cpu":
            assert routes.tolist() == want.routes.tolist()
            np.testing.assert_allclose(log_probs, want.log_probs, rtol=0, atol=TOLERANCES[EXACT].max_abs)
        leaves = [leaf for leaf in model.config.leaves if leaf == node or leaf.startswith(f"{node}_")]
        assert {model.config.leaves[i] for i in routes} <= set(leaves)


def test_candidates_that_tie_are_not_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the anchor cannot tell apart but other heads can: rounding decides which one is a candidate."""
    model = random_model([2], 4, fast_k=16)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for anchor in (0, 2):  # pairs of rows that differ by rounding; one token is alone, so that pairs get cut
            rows = model.heads[anchor].weight
            rows[1::2] = rows[:-1:2] * (1 + 1e-7 * torch.randn(48, 32, generator=random))
    save_model(model, tmp_path / "source")
    parity = export_onnx(tmp_path / "source", tmp_path / "onnx")["parity"]
    assert parity["whole"]["candidate_ties"] > 5
    assert parity["whole"]["max_abs_diff"] < 1e-4
    monkeypatch.setattr(reference, "EDGE", 0.0)
    with pytest.raises(ValidationError, match="largest log-prob difference"):
        export_onnx(tmp_path / "source", tmp_path / "other")
