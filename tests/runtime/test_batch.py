"""Compare batch rows with the same texts alone: ragged lengths, any tree, any scheme, rows moved and left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from dmpt_export.check.float_kernels import read_graph, use_float_kernels
from dmpt_export.check.reference import torch_references
from dmpt_export.check.tolerances import TOLERANCES, tolerance
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.manifest import write_manifest
from quant.checkpoint import save_quantized
from runtime.cache import zeros
from runtime.errors import RequestError
from runtime.model import Model
from tests.helpers.models import saved_model
from training.checkpoints.checkpoint import read_config
from training.model.shape import ROOT

EXACT = TOLERANCES[("float32", "float")].max_abs
CONTEXT, VOCAB = 150, 97  # grows once: 128, 150
TREES: dict[str, dict[str, Any]] = {
    "projected": {"splits": [2], "heads": 8, "fast_k": 16, "head_kind": "projected", "shared_anchor": True},
    "none": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4},
    "dual, fast-k": {"splits": [2], "heads": 8, "fast_k": 16},
    "quad, fast-k": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1},
}
KINDS = [(tree, scheme) for tree in TREES for scheme in ("float", "int8", "int4")]
DEPLOYED = ", as deployed"  # integer kernels round activations, differently for one row and for several


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Model]]:
    root, loaded = tmp_path_factory.mktemp("batch"), {}
    for tree, scheme in KINDS:
        source = root / tree
        if not source.exists():
            saved_model(source, **TREES[tree], n_positions=CONTEXT)
        if scheme != "float":
            save_quantized(source, root / f"{tree} {scheme}", scheme=scheme)
            source = root / f"{tree} {scheme}"
        out = root / f"{tree} {scheme} onnx"
        manifest = export_onnx(source, out, verify=False)
        loaded[tree, scheme + DEPLOYED] = runtime.load(out, threads=1)
        graph = read_graph(out / "model.onnx")
        use_float_kernels(graph)
        (out / "model.onnx").write_bytes(graph.SerializeToString())
        write_manifest(manifest, out)
        loaded[tree, scheme] = runtime.load(out, threads=1)
    yield loaded
    for model in loaded.values():
        model.close()


class Alone:
    """The slow reference: every text in its own sequence, copied by feeding it again."""

    def __init__(self, model: Model, rows: int) -> None:
        self.model = model
        self.ids: list[list[int]] = [[] for _ in range(rows)]

    def say(self) -> tuple[np.ndarray, list[int]]:
        results = []
        for ids in self.ids:
            sequence = self.model.sequence()
            results += [sequence.feed([token]) for token in ids][-1:]
        return np.concatenate([log_probs for log_probs, _ in results]), [int(routes[0]) for _, routes in results]

    def margin(self, row: int) -> float:
        """Routing margin of the row's last token, measured with torch as in the exporter's check.

        That is in units of a text's usual gap: tokens that follow, up to a full context, make the text long enough.
        """
        source, ids = self.model.folder.with_name(self.model.folder.name.removesuffix(" onnx")), self.ids[row]
        after = np.random.default_rng(0).integers(0, VOCAB, CONTEXT - len(ids))
        reference = torch_references(source, read_config(source), np.append(ids, after).astype(np.int64))[ROOT]
        return float(reference.margins[len(ids) - 1])


def assert_same(got: tuple[np.ndarray, np.ndarray], alone: Alone) -> None:
    """Routes exactly, log-probs to fp32 rounding."""
    want = alone.say()
    assert got[1].tolist() == want[1]
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS, ids=", ".join)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_rows_say_what_they_say_alone(kind: tuple[str, str], models: Any, data: st.DataObject) -> None:
    """Ragged prompts, steps, more prompts, rows moved, repeated, left out and forgotten, in any order."""
    model, rng = models[kind], np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = data.draw(st.integers(1, 4))
    batch, alone = model.batch(rows, data.draw(st.sampled_from([0, 140]))), Alone(model, rows)
    more = st.lists(st.sampled_from(["feed", "step", "step", "reorder", "forget"]), max_size=8)
    for action in ["feed", *data.draw(more)]:
        if action == "reorder":
            index = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=5))
            batch.reorder(index)
            alone.ids = [list(alone.ids[i]) for i in index]
            continue
        if action == "forget":
            batch.forget(0)
            alone.ids[0] = []
        new = [
            rng.integers(0, VOCAB, 1 if action == "step" else rng.integers(1, 9)).tolist() for _ in range(len(batch))
        ]
        got = batch.step([ids[0] for ids in new]) if action == "step" else batch.feed(new)
        alone.ids = [[*old, *ids] for old, ids in zip(alone.ids, new, strict=True)]
        assert batch.lengths.tolist() == [len(ids) for ids in alone.ids]
        assert_same(got, alone)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_integer_kernels_say_nearly_the_same_of_a_row_in_a_batch(scheme: str, models: Any) -> None:
    """The tolerance table's row for the scheme, over as many rows as the exporter's check uses."""
    model, line = models["dual, fast-k", scheme + DEPLOYED], tolerance("float32", scheme)
    rng, kl = np.random.default_rng(8), []
    for _ in range(12):
        batch, alone = model.batch(8), Alone(model, 8)
        alone.ids = [rng.integers(0, VOCAB, n).tolist() for n in rng.integers(2, 12, 8)]
        batch.feed([ids[:-1] for ids in alone.ids])
        log_probs, routes = batch.step([ids[-1] for ids in alone.ids])
        want, alone_routes = alone.say()
        differs = routes != alone_routes
        assert all(alone.margin(row) < line.gate_margin for row in np.flatnonzero(differs))
        kl += (np.exp(want) * (want - log_probs)).sum(-1)[~differs].tolist()
    assert len(kl) > 90
    assert np.mean(kl) < line.kl_mean


def test_room_grows_and_the_context_ends(models: Any) -> None:
    """Rows of unequal length, past the first capacity and up to a full context."""
    model, rng = models["quad, fast-k", "float"], np.random.default_rng(3)
    ids = rng.integers(0, VOCAB, (2, CONTEXT)).tolist()
    batch, alone = model.batch(2), Alone(model, 2)
    batch.feed([ids[0][:100], ids[1][:120]])
    assert batch.caches.capacity == 128
    for at in range(30):
        got = batch.step([ids[0][100 + at], ids[1][120 + at]])
    alone.ids = [ids[0][:130], ids[1]]
    assert batch.caches.capacity == CONTEXT == batch.lengths[1]
    assert_same(got, alone)
    for refused in (lambda: batch.step([1, 1]), lambda: batch.feed([[1], [1]])):
        with pytest.raises(RequestError, match="context"):
            refused()
    batch.reorder([0])
    alone.ids = [[*ids[0][:130], 7]]
    assert_same(batch.step([7]), alone)


def test_rows_that_stay_are_not_copied(models: Any) -> None:
    batch = models["dual", "float"].batch(3)
    batch.feed([[1], [2, 3], [4]])
    before = {name: buffer.address for name, buffer in batch.caches.buffers.items()}
    batch.reorder([0, 2, 2])
    batch.reorder([0, 2])
    assert {name: buffer.address for name, buffer in batch.caches.buffers.items()} == before
    assert len(batch) == 2
    assert batch.lengths.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.batch(0), "rows 0"),
        (lambda model: model.batch(2.5), "rows 2.5"),
        (lambda model: model.batch(2).feed([[1]]), "1 prompts for 2 rows"),
        (lambda model: model.batch(2).feed([[1], []]), "no tokens"),
        (lambda model: model.batch(2).feed([[1], [VOCAB]]), f"unknown token id {VOCAB}"),
        (lambda model: model.batch(1).feed([[1] * (CONTEXT + 1)]), "do not fit the context"),
        (lambda model: model.batch(2).step([1]), "1 token ids for 2 rows"),
        (lambda model: model.batch(2).step([1, -1]), "unknown token id -1"),
        (lambda model: model.batch(2).reorder([2]), "row 2 of 2"),
        (lambda model: model.batch(2).reorder([-1]), "row -1 of 2"),
        (lambda model: model.batch(2).reorder([]), "flat list of row numbers"),
        (lambda model: model.batch(2).reorder([[0]]), "flat list of row numbers"),
        (lambda model: model.batch(2).reorder([[0], [0, 1]]), "flat list of row numbers"),
        (lambda model: model.batch(2).forget(2), "no row 2"),
        (lambda model: model.batch(2).forget(-1), "no row -1"),
        (lambda model: model.batch(2).forget("a"), "no row 'a'"),
    ],
)
def test_bad_requests(call: Any, message: str, models: Any) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        call(models["dual", "float"])
    assert caught.value.exit_code == 3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_short_texts_do_not_take_the_memory_of_whole_contexts() -> None:
    """16 rows of 64 MB, of which 4 kB each are written."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    caches = zeros((16, 64, 1024, 256), "float32")
    assert not caches[:, :, 0].any()
    caches[:, :, 0] = 1.0
    assert caches.nbytes == 1 << 30
    assert resident() - before < 64 << 20
    assert caches[3, :, :2].sum() == 64 * 256
