"""The exported graph against torch: the parity ladder, storage, names, and cleanup after a failing check."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmpt_export.onnx.export as export_module
import runtime
from benchmarks.report import layers
from benchmarks.report.quantization import report_files
from dmpt_export.check.float_kernels import graphs, initializers, read_graph
from dmpt_export.check.tolerances import TOLERANCES, tolerance
from dmpt_export.graph.builder import OWN
from dmpt_export.inspect.graph_summary import stored_names
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from dmpt_export.onnx.sizes import touched_per_token
from quant.checkpoint import dequantized_model, load_weights, save_quantized
from quant.forms.blockwise import BlockwiseTensor
from quant.rules import parse_rule
from quant.schemes import SCHEMES
from tests.helpers.exports import TREES, all_scales, wrong_scale
from tests.helpers.models import random_calibration, random_model, saved_model
from training.errors import InputError, ValidationError
from training.model.shape import leaf_names

FLOAT = TOLERANCES[("float32", "float")]


def reference(source: Path, ids: list[int]) -> tuple[np.ndarray, list[str]]:
    """One-shot torch: deployed log-probs [S, V] and path names."""
    model = dequantized_model(source)
    batch = torch.tensor([ids])
    with torch.inference_mode():
        log_probs = model.log_probs(batch, fast_k=model.config.fast_k)[0].numpy()
        gates = model.hidden(batch).gates
        routes = model.routes(gates)[0].tolist() if gates else [0] * len(ids)
    return log_probs, [model.config.leaves[i] for i in routes]


def feed(model: Any, ids: list[int], cuts: list[tuple[int, int]]) -> list[tuple[int, np.ndarray, list[str]]]:
    """Feed chunks (size, last): for each, the end position, its log-probs and path names."""
    sequence, out = model.sequence(), []
    for size, last in cuts:
        start = sequence.length
        log_probs, routes = sequence.feed(ids[start : start + size], last=last)
        out.append((start + size, log_probs.copy(), [model.manifest.leaves[i] for i in routes]))
    return out


def assert_follows(
    model: Any, want: np.ndarray, routes: list[str], ids: list[int], cuts: list[tuple[int, int]]
) -> None:
    for stop, log_probs, paths in feed(model, ids, cuts):
        assert paths == routes[stop - len(paths) : stop]
        np.testing.assert_allclose(log_probs, want[stop - len(paths) : stop], rtol=0, atol=FLOAT.max_abs)


@pytest.mark.parametrize("name", TREES)
def test_float_onnx_equals_torch_whole_stepwise_and_chunked(name: str, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES[name])
    export_onnx(source, tmp_path / "onnx", verify=False)
    ids = np.random.default_rng(1).integers(0, random_model(**TREES[name]).config.vocab_size, 48).tolist()
    want, routes = reference(source, ids)
    if TREES[name]["splits"]:
        assert len(set(routes)) > 1, "a test model that never switches shows nothing"
    with runtime.load(tmp_path / "onnx", threads=1) as model:
        log_probs = model.log_probs(ids)
        assert model.routes(ids) == routes
        np.testing.assert_allclose(log_probs, want, rtol=0, atol=FLOAT.max_abs)
        assert_follows(model, want, routes, ids, [(48, 48)])
        assert_follows(model, want, routes, ids, [(1, 1)] * 48)
        assert_follows(model, want, routes, ids, [(7, 1), (1, 1), (10, 3), (2, 2), (20, 1), (8, 8)])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_trees_sizes_and_chunkings(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    n_layer = data.draw(st.integers(1, 4))
    splits = sorted(data.draw(st.sets(st.integers(1, n_layer - 1), max_size=2))) if n_layer > 1 else []
    per_leaf = data.draw(st.integers(1, 3))
    fields = {
        "n_layer": n_layer,
        "n_embd": 8 * data.draw(st.integers(1, 4)) * 2,
        "n_head": 2,
        "vocab_size": data.draw(st.integers(5, 80)),
        "n_positions": 40,
        "head_topk": data.draw(st.sampled_from([None, *range(1, per_leaf + 1)])),
    }
    if data.draw(st.booleans()):
        fields |= {"head_kind": "projected", "shared_anchor": data.draw(st.booleans())}
        fields["head_rank"] = data.draw(st.none() | st.integers(1, fields["n_embd"]))
    if data.draw(st.booleans()):  # any heads for any leaf, so that leaves share heads and anchors
        leaves = leaf_names(splits, n_layer)
        chosen = [data.draw(st.lists(st.integers(0, 3), min_size=per_leaf, max_size=4, unique=True)) for _ in leaves]
        ids = sorted({j for heads in chosen for j in heads})
        fields["head_allocation"] = {
            leaf: [ids.index(j) for j in heads] for leaf, heads in zip(leaves, chosen, strict=True)
        }
    fields["fast_k"] = data.draw(st.none() | st.integers(1, fields["vocab_size"]))
    cuts, left = [], data.draw(st.integers(1, 40))
    length = left
    while left:
        size = data.draw(st.integers(1, left))
        cuts.append((size, data.draw(st.integers(1, size))))
        left -= size
    root = tmp_path_factory.mktemp("tree")
    source = saved_model(root / "source", splits, per_leaf * 2 ** len(splits), data.draw(st.integers(0, 99)), **fields)
    export_onnx(source, root / "onnx", verify=False)
    ids = np.random.default_rng(length).integers(0, fields["vocab_size"], length).tolist()
    want, routes = reference(source, ids)
    with runtime.load(root / "onnx", threads=1) as model:
        assert_follows(model, want, routes, ids, cuts)


LAYOUTS = ("int8", "int4", "int2", "int8-dynamic")  # the other schemes store one of these
MORE = ("gpt2", "quad, fast-k", "shared heads", "projected", "projected, one anchor", "projected, shared heads")
EVERY_KIND = [
    (name, scheme)
    for scheme in SCHEMES
    if scheme != "fp16" and SCHEMES[scheme].package is None  # for those see tests.quant.test_bnb
    for name in ("dual, fast-k", "odd sizes", *(MORE if scheme in LAYOUTS else ()))
] + [("projected", "int4-gptq"), ("projected, one anchor", "int3-gptq")]


@pytest.mark.parametrize(("name", "scheme"), EVERY_KIND)
def test_quantized_onnx_follows_torch_with_dequantized_weights(name: str, scheme: str, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES[name])
    calibration = random_calibration(source) if SCHEMES[scheme].calibrated else None
    save_quantized(source, tmp_path / "quantized", scheme, calibration=calibration)
    parity = export_onnx(tmp_path / "quantized", tmp_path / "onnx")["parity"]  # raises beyond the table
    assert parity["whole"]["kl_mean"] > 0  # integer kernels round activations: exactly zero would mean float ran


@pytest.mark.parametrize("name", ["dual, fast-k", "odd sizes", "multi-head", *MORE])
def test_every_matrix_rounded_by_row_follows_torch(name: str, tmp_path: Path) -> None:
    """int8-dynamic for the vocabulary too: one array serves embedding, logits and candidates."""
    source = saved_model(tmp_path / "source", **TREES[name])
    save_quantized(source, tmp_path / "quantized", "int8-dynamic", vocabulary="int8-dynamic")
    parity = export_onnx(tmp_path / "quantized", tmp_path / "onnx")["parity"]
    assert parity["whole"]["kl_mean"] > 0
    stored = [tensor.name for tensor in initializers(read_graph(tmp_path / "onnx" / "model.onnx").graph)]
    assert not [one for one in stored if one.startswith("transformer.wte.weight.int8") and not one.endswith(".rows")]
    assert stored.count("transformer.wte.weight.int8.rows") == 1


def test_initializers_of_branches_stay_in_the_graph_file(tmp_path: Path) -> None:
    """onnxruntime-web cannot read them from a data file."""
    source = saved_model(tmp_path / "source", **TREES["quad, fast-k"], n_embd=128, n_head=4)
    save_quantized(source, tmp_path / "quantized", "int8")
    export_onnx(tmp_path / "quantized", tmp_path / "onnx", verify=False)
    whole = read_graph(tmp_path / "onnx" / "model.onnx").graph
    own = [tensor for part in graphs(whole) if part is not whole for tensor in part.initializer]
    assert max(len(tensor.raw_data) for tensor in own) > 1024, "none is large enough for a data file"
    assert not [tensor.name for tensor in own if tensor.external_data]
    assert [tensor.name for tensor in whole.initializer if tensor.external_data]


def test_what_quantizing_cost_goes_along(tmp_path: Path) -> None:
    """A comparison of exported models draws it."""
    source = saved_model(tmp_path / "source", [], 1)
    save_quantized(source, tmp_path / "quantized", "int8", files=lambda reports: report_files(reports, None))
    export_onnx(tmp_path / "quantized", tmp_path / "onnx", verify=False)
    found = layers.layers(tmp_path / "onnx")
    assert found
    assert all(0 < layer["relative_error"] < 0.02 for layer in found)


def test_mixed_schemes_are_held_to_the_loosest_of_their_lines(tmp_path: Path) -> None:
    source, rule = saved_model(tmp_path / "source", **TREES["dual, fast-k"]), parse_rule("*.h.0.mlp.c_fc=int8-dynamic")
    save_quantized(source, tmp_path / "quantized", scheme="int4", rules=[rule])
    manifest = export_onnx(tmp_path / "quantized", tmp_path / "onnx")
    assert re.fullmatch(r"mixed \d\.\d bits", manifest["quantization"]["scheme"])
    assert manifest["parity"]["tolerance"] == vars(tolerance("float32", "int8-dynamic"))


@pytest.mark.parametrize("scheme", ["int8", "int4", "int3", "int2"])
def test_stored_zero_points_reach_the_graph(scheme: str, tmp_path: Path) -> None:
    """In multiplications and in looked-up rows; the check with float kernels sees a missing one."""
    source = saved_model(tmp_path / "source", **TREES["shared heads"])
    save_quantized(source, tmp_path / "quantized", f"{scheme}:asymmetric")
    _, weights = load_weights(tmp_path / "quantized")
    assert all(w.zero_points is not None for w in weights.values() if isinstance(w, BlockwiseTensor))
    assert export_onnx(tmp_path / "quantized", tmp_path / "onnx")["parity"]["float_kernels"]["whole"]["routes_equal"]


@pytest.mark.parametrize(
    ("name", "ifs"),
    [("quad, fast-k", 7), ("dual, fast-k", 3), ("shared heads", 3), ("projected", 3), ("projected, one anchor", 7)],
)
@pytest.mark.parametrize("scheme", ["float", "int8", "int4"])
def test_every_tensor_is_stored_once(name: str, ifs: int, scheme: str, tmp_path: Path) -> None:
    """Weights are in the main graph, except the scales of products in a branch. A matrix that is multiplied in several
    branches, or multiplied and also looked up by row, needs them in each place."""
    folder = source = saved_model(tmp_path / "source", **TREES[name])
    if scheme != "float":
        folder = tmp_path / "quantized"
        save_quantized(source, folder, scheme=scheme)
    export_onnx(folder, tmp_path / "onnx", verify=False)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    guards = (".if_any.then", ".if_any.else")  # around TopK, without weights
    assert len([part for part in graphs(graph) if not part.name.endswith(guards)]) == 1 + 2 * ifs
    stored = [(t.name, onnx.numpy_helper.to_array(t).nbytes) for t in initializers(graph)]
    _, weights = load_weights(folder)
    for key in weights:
        assert any(key in stored_names(initializer) for initializer, _ in stored), f"{key} is not in the graph"
    inner = {t.name for part in graphs(graph) if part is not graph for t in part.initializer}
    assert bool(inner) == (scheme != "float")
    assert all(initializer.endswith(f".scales{OWN}") for initializer in inner)
    constants = sum(size for key, size in stored if key.startswith("const."))
    # heads whose scales are stored again: those in two branches, and an anchor's for the rows of projected heads
    anchor = [] if scheme == "int8" else [0]  # whose 8-bit candidates are read with the product's scales
    again = {"shared heads": [0, 2], "projected": [0, 4], "projected, one anchor": anchor}.get(name, [])
    more = [weights[f"heads.{j}.weight"] for j in again]
    scales = sum(head.scales.nbytes for head in more if isinstance(head, BlockwiseTensor))
    assert sum(size for _, size in stored) - constants == sum(w.nbytes for w in weights.values()) + scales


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("name", ["dual, fast-k", "dual, all heads", "quad, all heads", "shared heads"])
def test_products_in_a_branch_find_their_scales_there(
    name: str, scheme: str, asymmetric: bool, kv_cache: str, tmp_path: Path
) -> None:
    """Kernels that read scales while packing weights only see the same graph: on Arm processors with dot-product
    instructions, onnxruntime 1.28 and earlier crash on scales outside."""
    source = saved_model(tmp_path / "source", **TREES[name])
    rules = [parse_rule("heads.*=delta-r16")] if name == "dual, all heads" and not asymmetric else []
    save_quantized(source, tmp_path / "quantized", f"{scheme}:asymmetric" if asymmetric else scheme, rules)
    export_onnx(tmp_path / "quantized", tmp_path / "onnx", ExportOptions(kv_cache=kv_cache), verify=False)
    main, *branches = graphs(read_graph(tmp_path / "onnx" / "model.onnx").graph)
    shared = {t.name for t in main.initializer}
    products = 0
    for branch in branches:
        own = {t.name for t in branch.initializer}
        assert not own & shared  # a name means one thing
        for node in branch.node:
            if node.op_type == "MatMulNBits":
                _, packed, scales, zero_points, *_ = [*node.input, "", ""]
                assert packed in shared
                assert scales in own
                assert zero_points in (own if asymmetric else {""})
                products += 1
    assert products > 8


def test_node_names_mirror_tensor_names(tmp_path: Path) -> None:
    export_onnx(saved_model(tmp_path / "source", **TREES["dual, fast-k"]), tmp_path / "onnx", verify=False)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    names = {node.name for node in graph.node}
    for node in graph.node:
        for attribute in node.attribute:
            names |= {n.name for n in attribute.g.node}
    assert {"transformer.h.0.attn.c_attn", "paths.left", "paths.left.h.2.mlp.c_fc", "paths.right.ln_f"} <= names
    assert {"gates.root.2", "head_gates.right.0", "heads.0", "heads.5_6_7.rows.gathered"} <= names


@pytest.mark.parametrize("name", ["gpt2", "dual, fast-k", "quad, all heads"])
def test_checker_and_strict_shape_inference_pass(name: str, tmp_path: Path) -> None:
    export_onnx(saved_model(tmp_path / "source", **TREES[name]), tmp_path / "onnx", verify=False)
    path = tmp_path / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)


def test_a_moved_artefact_still_runs(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES["dual, fast-k"])
    export_onnx(source, tmp_path / "onnx", verify=False)
    shutil.move(tmp_path / "onnx", tmp_path / "elsewhere")
    want, _ = reference(source, [5, 6, 7])
    with runtime.load(tmp_path / "elsewhere") as model:
        np.testing.assert_allclose(model.log_probs([5, 6, 7]), want, rtol=0, atol=FLOAT.max_abs)


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "int2"])
@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        ("paths.right.h.3.mlp.c_fc.weight", wrong_scale),
        ("transformer.h.0.attn.c_attn.weight", wrong_scale),
        ("heads.4.weight", all_scales),
        ("gates.root.2.weight", lambda weight: weight[::-1]),
        ("head_gates.left.2.bias", lambda bias: bias[::-1]),
    ],
)
def test_a_planted_fault_fails_verification_and_leaves_nothing(
    tensor: str, fault: Any, scheme: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved_model(tmp_path / "source", **TREES["dual, fast-k"])
    if scheme:
        save_quantized(source, tmp_path / "quantized", scheme=scheme)

    def damaged(folder: Path) -> Any:
        config, weights = load_weights(folder)
        return config, {**weights, tensor: fault(weights[tensor])}

    monkeypatch.setattr(export_module, "load_weights", damaged)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValidationError, match=r"position \d+"):
        export_onnx(tmp_path / "quantized" if scheme else source, tmp_path / "onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("options", "message"), [({"fast_k": 98}, "98"), ({"head_topk": 5}, "head_topk")])
def test_impossible_options_are_refused(options: dict[str, int], message: str, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES["dual, fast-k"])
    with pytest.raises(InputError, match=message):
        export_onnx(source, tmp_path / "onnx", ExportOptions(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_heads_that_the_kernel_cannot_take_are_refused(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [2], 2, n_embd=12, n_head=3)
    with pytest.raises(InputError, match="heads are 4 wide"):
        export_onnx(source, tmp_path / "onnx")


def test_overrides_are_what_is_deployed(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES["dual, fast-k"])
    manifest = export_onnx(source, tmp_path / "onnx", ExportOptions(fast_k=0, head_topk=1))
    assert manifest["config"]["fast_k"] is None
    assert manifest["config"]["head_topk"] == 1
    assert manifest["parity"]["whole"]["routes_equal"]


def test_parameters_touched_per_token_by_hand() -> None:
    model = random_model([2], 4, fast_k=10, vocab_size=50, n_positions=20, n_embd=8, n_head=2, gate_hidden=3)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    block = 2 * 16 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    gate = (8 * 3 + 3) + (3 * 2 + 2)
    # 4 blocks deep, ln_f, one row of wte and wpe, the gate and a head gate of 2, one head and 10 rows of another
    want = 4 * block + 16 + 8 + 8 + gate + gate + 50 * 8 + 10 * 8
    assert touched_per_token(model.config, weights) == (want, 4 * want)
    projected = random_model([2], 4, fast_k=10, vocab_size=50, n_positions=20, n_embd=8, n_head=2, gate_hidden=3,
                             head_kind="projected", shared_anchor=True)  # fmt: skip
    weights = {name: tensor.numpy() for name, tensor in projected.state_dict().items()}
    # right: both heads project, in front of one matrix that is read once
    assert touched_per_token(projected.config, weights)[0] == want - 10 * 8 + 2 * 8 * 8
    projected.config.fast_k = None  # without candidates each head multiplies the whole matrix
    assert touched_per_token(projected.config, weights)[0] == want - 10 * 8 + 50 * 8 + 2 * 8 * 8


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int2"])
def test_what_has_no_cuda_kernel_is_refused_for_cuda(scheme: str, tmp_path: Path) -> None:
    save_quantized(saved_model(tmp_path / "source", [2], 4), tmp_path / "quantized", scheme)
    with pytest.raises(InputError, match=f"{scheme} has no CUDA kernel"):
        export_onnx(tmp_path / "quantized", tmp_path / "onnx", ExportOptions(target="cuda"), verify=False)
    assert not (tmp_path / "onnx").exists()
