"""Feeding tokens: whole = chunked = stepwise, growing caches, nodes that lag and catch up, bad ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from benchmarks.quality.checkpoint_scorer import TorchScorer
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.manifest import write_manifest
from runtime.cache import FIRST_CAPACITY
from runtime.errors import OutOfMemory, RequestError
from runtime.lookup import MOST_SPECULATED
from runtime.model import SCORED_AT_ONCE, Model
from runtime.sequence import Sequence
from tests.helpers.tolerances import TOLERANCE
from training.checkpoints.checkpoint import load_model

FLOAT = TOLERANCE[("float32", "float")]
CONTEXT = 300  # grows twice: 128, 256, 300
IDS = np.random.default_rng(5).integers(0, 300, CONTEXT)


@pytest.fixture(scope="module")
def sources(
    tiny_gpt2: Path, make_dmpt: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints: plain GPT-2, and a dual and a quad with a context long enough for caches to grow."""
    root = tmp_path_factory.mktemp("sequence")
    make_dmpt(root / "dual", splits=[2], n_positions=CONTEXT, fast_k=16)
    heads = {"left_left": [0], "left_right": [1, 2], "right_left": [3, 4, 5], "right_right": [6, 7]}
    make_dmpt(root / "quad", splits=[1, 3], n_positions=CONTEXT, head_allocation=heads, fast_k=9, head_topk=2)
    return {"gpt2": tiny_gpt2, "dual": root / "dual", "quad": root / "quad"}


@pytest.fixture(scope="module")
def models(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    out = tmp_path_factory.mktemp("exported")
    for name, source in sources.items():
        export_onnx(source, out / name, verify=False)
    loaded = {name: runtime.load(out / name, threads=1) for name in sources}
    yield loaded
    for model in loaded.values():
        model.close()


@pytest.fixture(scope="module")
def whole(models: dict[str, Model]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Everything in one run of one sequence."""
    out = {}
    for name, model in models.items():
        ids = IDS[: model.context]
        out[name] = model.sequence().feed(ids, last=len(ids))
    return out


@pytest.mark.parametrize("name", ["gpt2", "dual", "quad"])
def test_whole_equals_torch(
    name: str, models: dict[str, Model], sources: dict[str, Path], whole: dict[str, Any]
) -> None:
    reference = load_model(sources[name])
    batch = torch.from_numpy(IDS[None, : models[name].context])
    with torch.inference_mode():
        want = reference.log_probs(batch, fast_k=reference.config.fast_k)[0].numpy()
        gates = reference.hidden(batch).gates
    log_probs, routes = whole[name]
    if gates:
        assert routes.tolist() == reference.routes(gates)[0].tolist()
        assert len(set(routes.tolist())) == len(models[name].manifest.leaves)
    assert log_probs.dtype == np.float32
    assert log_probs.shape == want.shape
    np.testing.assert_allclose(log_probs, want, rtol=0, atol=FLOAT)


@pytest.mark.parametrize("name", ["gpt2", "dual", "quad"])
def test_score_routes_and_log_probs_agree_with_one_run(
    name: str, models: dict[str, Model], whole: dict[str, Any]
) -> None:
    model, (want, routes) = models[name], whole[name]
    ids = IDS[: model.context].tolist()
    np.testing.assert_allclose(model.log_probs(ids), want, rtol=0, atol=FLOAT)
    assert model.routes(ids) == [model.manifest.leaves[leaf] for leaf in routes]
    for last in (1, 3, SCORED_AT_ONCE, len(ids) - 1, len(ids)):
        got, taken = model.score(ids, last=last)
        assert got.shape == (last, 300)
        assert taken.tolist() == routes[-last:].tolist()
        np.testing.assert_allclose(got, want[-last:], rtol=0, atol=FLOAT)
        parts = [(rows.copy(), leaves) for rows, leaves, _ in model.score_pieces(ids, last)]
        assert all(0 < len(rows) <= SCORED_AT_ONCE for rows, _ in parts)
        assert np.array_equal(np.concatenate([rows for rows, _ in parts]), got)
        assert np.array_equal(np.concatenate([leaves for _, leaves in parts]), taken)


@pytest.mark.parametrize("name", ["gpt2", "dual", "quad"])
def test_heads_weigh_as_in_torch(name: str, models: dict[str, Model], sources: dict[str, Path]) -> None:
    """Each position's weights, those of other leaves' heads 0, in a run over many tokens and in single steps."""
    model = models[name]
    ids = IDS[:60]
    (piece,) = TorchScorer(load_model(sources[name]), sources[name], 1, "cpu", "gate_hard", name).pieces([(ids, 60)])
    assert piece.head_weights is not None
    assert piece.head_weights.sum(1) == pytest.approx(np.ones(60))
    ((_, _, whole),) = model.score_pieces(ids)
    assert whole is not None
    assert model.manifest.tells_head_weights
    np.testing.assert_allclose(whole, piece.head_weights, rtol=0, atol=FLOAT)
    assert ((whole == 0) == (piece.head_weights == 0)).all()
    sequence, steps = model.sequence(), []
    for token in ids:
        sequence.feed([token])
        steps.append(sequence.head_weights())
    np.testing.assert_allclose(np.concatenate(steps), piece.head_weights, rtol=0, atol=FLOAT)


def test_an_export_that_does_not_tell_head_weights_still_runs(sources: dict[str, Path], tmp_path: Path) -> None:
    """An older export."""
    export_onnx(sources["quad"], tmp_path / "old", verify=False)
    model = onnx.load(tmp_path / "old" / "model.onnx", load_external_data=False)
    for output in [o for o in model.graph.output if o.name.startswith("head_log_weights.")]:
        model.graph.output.remove(output)
    (tmp_path / "old" / "model.onnx").write_bytes(model.SerializeToString())
    raw = json.loads((tmp_path / "old" / "dmpt_manifest.json").read_text())
    raw["outputs"] = [spec for spec in raw["outputs"] if not spec["name"].startswith("head_log_weights.")]
    write_manifest(raw, tmp_path / "old")
    with runtime.load(tmp_path / "old", threads=1) as old:
        assert not old.manifest.tells_head_weights
        assert [weights for _, _, weights in old.score_pieces(IDS[:60])] == [None]


@pytest.mark.parametrize("name", ["gpt2", "dual", "quad"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_chunks_say_the_same(name: str, models: dict[str, Model], whole: Any, data: st.DataObject) -> None:
    model, (want, routes) = models[name], whole[name]
    sequence = model.sequence(capacity=data.draw(st.sampled_from([0, 1, 200])))
    while sequence.length < model.context:
        size = data.draw(st.integers(1, min(100, model.context - sequence.length)))
        last = data.draw(st.integers(1, size))
        stop = sequence.length + size
        log_probs, taken = sequence.feed(IDS[sequence.length : stop], last=last)
        assert taken.tolist() == routes[stop - last : stop].tolist()
        np.testing.assert_allclose(log_probs, want[stop - last : stop], rtol=0, atol=FLOAT)


def test_stepwise_over_the_whole_context(models: dict[str, Model], whole: Any) -> None:
    want, routes = whole["quad"]
    sequence = models["quad"].sequence()
    steps = [sequence.feed([token]) for token in IDS]
    assert [int(taken[0]) for _, taken in steps] == routes.tolist()
    np.testing.assert_allclose(np.concatenate([rows for rows, _ in steps]), want, rtol=0, atol=FLOAT)


def test_nodes_that_are_not_taken_wait_and_then_catch_up(models: dict[str, Model], whole: Any) -> None:
    """Every run advances exactly the nodes on the way to the chosen leaf."""
    model, routes = models["quad"], whole["quad"][1]
    sequence, lags = model.sequence(), set()
    expected = dict.fromkeys(model.manifest.nodes, 0)
    for at, token in enumerate(IDS, start=1):
        sequence.feed([token])
        expected |= dict.fromkeys(model.manifest.way(model.manifest.leaves[routes[at - 1]]), at)
        assert sequence.done == expected
        lags.add(expected["left"] - expected["left_left"])
    assert sequence.length == CONTEXT
    assert max(lags) > 1


@pytest.mark.parametrize("name", ["gpt2", "dual", "quad"])
def test_every_node_catches_up_when_told_to(name: str, models: dict[str, Model], whole: Any) -> None:
    """Also where no row is routed to a leaf, whose heads then see no rows at all."""
    model, (want, routes) = models[name], whole[name]
    sequence, log_probs = model.sequence(), np.empty((1, 300), np.float32)
    for at, (size, every_node) in enumerate([(1, True), (4, False), (1, True), (7, False), (9, True), (1, False)] * 2):
        stop = sequence.length + size
        taken = sequence.run(IDS[sequence.length : stop], log_probs, every_node)
        assert taken[0] == routes[stop - 1], at
        np.testing.assert_allclose(log_probs[0], want[stop - 1], rtol=0, atol=FLOAT)
        assert not every_node or set(sequence.done.values()) == {stop}


def test_capacity_doubles_up_to_the_context(models: dict[str, Model]) -> None:
    sequence = models["dual"].sequence()
    seen = []
    for start in range(0, CONTEXT, 50):
        sequence.feed(IDS[start : start + 50])
        seen.append(sequence.capacity)
    assert FIRST_CAPACITY == 128
    assert seen == [128, 128, 256, 256, 256, 300]
    assert models["dual"].sequence(capacity=200).capacity == 256


def test_caches_are_written_in_place(models: dict[str, Model]) -> None:
    sequence = models["dual"].sequence()
    sequence.feed(IDS[:1])
    cache = sequence.caches.buffers["transformer.h.0.key"].array
    assert cache is not None
    assert cache[:, :, :1].any(axis=-1).all()
    assert not cache[:, :, 1:].any()
    before = cache[:, :, :1].copy()
    sequence.feed(IDS[1:9])
    assert sequence.caches.buffers["transformer.h.0.key"].array is cache
    assert cache[:, :, :9].any(axis=-1).all()
    assert not cache[:, :, 9:].any()
    np.testing.assert_array_equal(cache[:, :, :1], before)


def test_results_belong_to_the_caller(models: dict[str, Model]) -> None:
    sequence = models["dual"].sequence()
    log_probs, routes = sequence.feed(IDS[:4], last=2)
    kept, taken = log_probs.copy(), routes.copy()
    for token in IDS[4:20]:
        sequence.feed([token])
    sequence.feed(IDS[20:24], last=2)
    np.testing.assert_array_equal(log_probs, kept)
    np.testing.assert_array_equal(routes, taken)


def test_reset_forgets_everything(models: dict[str, Model], whole: Any) -> None:
    sequence = models["quad"].sequence()
    sequence.feed(IDS[::-1])
    sequence.reset()
    assert sequence.length == 0
    log_probs, _ = sequence.feed(IDS[:40], last=40)
    np.testing.assert_allclose(log_probs, whole["quad"][0][:40], rtol=0, atol=FLOAT)


def test_sequences_share_a_model_also_across_threads(models: dict[str, Model], whole: Any) -> None:
    def walk(offset: int) -> np.ndarray:
        sequence = models["dual"].sequence()
        return np.concatenate([sequence.feed([token])[0] for token in np.roll(IDS, -offset)[:60]])

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(walk, range(0, 200, 50)))
    for offset, got in zip(range(0, 200, 50), together, strict=True):
        np.testing.assert_array_equal(got, walk(offset))
    np.testing.assert_allclose(together[0], whole["dual"][0][:60], rtol=0, atol=FLOAT)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no tokens"),
        ([1, 300], "unknown token id 300 at position 1: the vocabulary has ids 0 to 299"),
        ([-1], "unknown token id -1"),
        ([2**63], "unknown token id"),
        ([2**70], "whole numbers"),
        ([1.5], "whole numbers"),
        ([True], "whole numbers"),
        ([None], "whole numbers"),
        ([[1, 2]], "flat list"),
        ([[1], [2, 3]], "flat list"),
        (7, "flat list"),
        (None, "flat list"),
        ([1] * 301, "301 tokens do not fit the context of 300"),
    ],
)
def test_bad_ids(ids: Any, message: str, models: dict[str, Model]) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: models["dual"].log_probs(ids),
        lambda: models["dual"].routes(ids),
        lambda: models["dual"].sequence().feed(ids),
    ]
    if message != "flat list" or not isinstance(ids, list):  # lists of lists are several prompts
        calls.append(lambda: models["dual"].generate(ids))
    for call in calls:
        with pytest.raises(RequestError, match=message) as caught:
            call()
        assert caught.value.exit_code == 3


def test_a_refused_feed_changes_nothing(models: dict[str, Model], whole: Any) -> None:
    sequence = models["dual"].sequence()
    sequence.feed(IDS[:50])
    for ids, last in (([300], 1), (IDS[:5], 6), (IDS[:5], 0), (IDS[:251], 1), (IDS[:5], 2.0)):
        with pytest.raises(RequestError):
            sequence.feed(ids, last=last)  # type: ignore[arg-type]
    assert sequence.length == 50
    log_probs, _ = sequence.feed(IDS[50:60], last=10)
    np.testing.assert_allclose(log_probs, whole["dual"][0][50:60], rtol=0, atol=FLOAT)


def test_ids_may_be_any_kind_of_whole_numbers(models: dict[str, Model]) -> None:
    model = models["gpt2"]
    want = model.log_probs([1, 2, 3])
    for ids in ((1, 2, 3), np.array([1, 2, 3], np.uint8), torch.tensor([1, 2, 3]), range(1, 4)):
        np.testing.assert_array_equal(model.log_probs(ids), want)


def test_only_what_changed_is_bound_again(models: dict[str, Model]) -> None:
    """After the first steps, a step binds only the pending rows and the split nodes' rows."""
    sequence = models["dual"].sequence()
    log_probs = np.empty((1, 300), np.float32)
    sequence.run(IDS[:10], log_probs)
    sequence.run(IDS[10:11], log_probs)
    bound = Recorder(sequence)
    for token in range(5):
        sequence.run(IDS[11 + token : 12 + token], log_probs)
    assert bound.names <= {"pending.left", "pending.right", "rows.root"}


class Recorder:
    """Records the names that a sequence binds from now on."""

    def __init__(self, sequence: Sequence) -> None:
        self.names: set[str] = set()
        self.inner = sequence.binding
        sequence.binding = self

    def bind_input(self, name: str, *place: Any) -> None:
        self.names.add(name)
        self.inner.bind_input(name, *place)

    def bind_output(self, name: str, *place: Any) -> None:
        self.names.add(name)
        self.inner.bind_output(name, *place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_memory_is_given_back_after_long_runs_only(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, guesses and scoring chunks would only allocate the memory again."""
    model, tidied = models["dual"], []
    run = model.engine.run
    monkeypatch.setattr(model.engine, "run", lambda binding, tidy: tidied.append(tidy) or run(binding, tidy))
    sequence = model.sequence()
    for size in (1, 1 + MOST_SPECULATED, 2 + MOST_SPECULATED):
        sequence.feed(IDS[:size])
    model.score(IDS[:150])
    assert tidied == [False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("size", "last", "sizes"), [(5, 1, [5]), (11, 1, [5, 5, 1]), (23, 12, [5, 5, 13]), (9, 9, [9])]
)
def test_a_long_prompt_is_read_in_pieces_where_no_token_chooses_a_path(
    size: int, last: int, sizes: list[int], models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.sequence, "PIECE", 5)
    for name, expected in (("gpt2", sizes), ("dual", [size])):
        sequence = models[name].sequence()
        sequence.feed(IDS[:3])
        seen, bind = [], sequence.bind_call
        monkeypatch.setattr(sequence, "bind_call", lambda n, out, seen=seen, bind=bind: seen.append(n) or bind(n, out))
        got, _ = sequence.feed(IDS[3 : 3 + size], last=last)
        assert seen == expected
        whole = models[name].score(IDS[: 3 + size])[0][-last:]
        np.testing.assert_allclose(got, whole, rtol=0, atol=FLOAT)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_prompt_in_pieces_is_read_whole_or_not_at_all(
    failing: int, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["gpt2"]
    monkeypatch.setattr(runtime.sequence, "PIECE", 5)
    sequence, run, runs = model.sequence(), model.engine.run, []
    sequence.feed(IDS[:3])

    def fail(binding: Any, tidy: bool) -> None:
        runs.append(tidy)
        if len(runs) == 1 + failing:
            raise OutOfMemory("planted")
        run(binding, tidy)

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "run", fail)
        with pytest.raises(OutOfMemory):
            sequence.feed(IDS[3:15])
    assert sequence.length == 3
    np.testing.assert_allclose(sequence.feed(IDS[3:15])[0], model.score(IDS[:15])[0][-1:], rtol=0, atol=FLOAT)
