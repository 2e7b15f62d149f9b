"""The proof in an exported folder: what the device finds by it, and what it forgives."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from dmpt_export.check.outcomes import distances as whole_distances
from dmpt_export.check.proof import OTHERS, PROVEN, TOP, proof_of
from dmpt_export.check.reference import Reference, torch_references
from dmpt_export.check.tolerances import EXACT, TOLERANCES
from dmpt_export.check.verify import CHECKED_TOKENS, SEED
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import save_quantized
from runtime.batch import Batch
from runtime.errors import CheckError, ModelError
from runtime.files import sha256
from runtime.manifest_file import MANIFEST_NAME, PROOF_NAME, read_manifest
from runtime.model import Model
from runtime.proof import Proof, build, read_proof
from runtime.self_check import STEPS, TOGETHER, WHOLE, SelfCheck, compared, distances
from tests.helpers.exports import TREES
from tests.helpers.models import saved_model
from training.checkpoints.checkpoint import read_config

VOCAB = 97


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("proof") / "dual", **TREES["dual, fast-k"])


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    export_onnx(checkpoint, checkpoint.with_name("onnx"))
    return checkpoint.with_name("onnx")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def publish(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and its entry in the manifest."""
    path, manifest = folder / name, folder / MANIFEST_NAME
    path.write_bytes(content)
    raw = json.loads(manifest.read_text())
    raw["files"][name] = {"sha256": sha256(path), "size": path.stat().st_size}
    manifest.write_text(json.dumps(raw))


def edit_proof(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / PROOF_NAME).read_text())
    change(raw)
    publish(folder, PROOF_NAME, json.dumps(raw).encode())


def checked(folder: Path) -> SelfCheck:
    with runtime.load(folder, threads=1) as model:
        return model.self_check()


def failures(found: SelfCheck) -> dict[str, str]:
    return {part.name: part.failure for part in found.parts if part.failure is not None}


# --- what the export writes -------------------------------------------------------------------------


def test_the_proof_is_what_torch_gives(checkpoint: Path, exported: Path) -> None:
    ids = np.random.default_rng(SEED).integers(0, VOCAB, min(CHECKED_TOKENS, 64))
    want = torch_references(checkpoint, read_config(checkpoint), ids)["root"]
    proof = read_proof(exported, read_manifest(exported))
    assert proof.ids.tolist() == ids[:PROVEN].tolist()
    assert proof.routes.tolist() == want.routes[:PROVEN].tolist()
    assert set(proof.routes.tolist()) == {0, 1}
    np.testing.assert_allclose(proof.margins, want.margins[:PROVEN], atol=1e-6)
    for row, known in enumerate(want.log_probs[:PROVEN]):
        assert proof.top_ids[row].tolist() == sorted(range(VOCAB), key=lambda v: -known[v])[:TOP]
        np.testing.assert_allclose(proof.top_log_probs[row], known[proof.top_ids[row]], atol=1e-6)
        np.testing.assert_allclose(proof.other_log_probs[row], known[proof.other_ids], atol=1e-6)
        left = set(range(VOCAB)) - {*proof.top_ids[row].tolist(), *proof.other_ids.tolist()}
        assert math.exp(proof.rest[row]) == pytest.approx(sum(math.exp(known[v]) for v in left), rel=1e-5)
    assert vars(proof.tolerance) == vars(TOLERANCES[EXACT])
    assert (exported / PROOF_NAME).stat().st_size < 20_000


def test_this_machine_passes_with_the_figures_of_the_export(exported: Path) -> None:
    found = checked(exported)
    assert found.failure is None
    found.require()
    assert [(part.name, part.positions) for part in found.parts] == [(WHOLE, 48), (STEPS, 33), (TOGETHER, 50)]
    assert found.proof.exported is not None
    for part in found.parts:
        then = found.proof.exported["parts"][part.name]
        assert part.max_abs_diff == pytest.approx(then["max_abs_diff"], abs=1e-5)
        assert part.kl_mean == pytest.approx(then["kl_mean"], abs=1e-6)
        assert part.top1_agreement == then["top1_agreement"] == 1


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
def test_quantized_exports_prove_themselves(scheme: str, checkpoint: Path, tmp_path: Path) -> None:
    save_quantized(checkpoint, tmp_path / "weights", scheme=scheme)
    export_onnx(tmp_path / "weights", tmp_path / "onnx")
    found = checked(tmp_path / "onnx")
    assert found.failure is None
    assert (found.parts[2].skipped is not None) == (scheme == "int8-dynamic")
    assert found.proof.tolerance.max_abs is None


# --- the reduced distance ---------------------------------------------------------------------------


def rows_of(seed: int, size: int, vocab: int, spread: float) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, (size, vocab))
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)), np.float32)


def proof_from(log_probs: np.ndarray, **more: Any) -> Proof:
    size = len(log_probs)
    plain: dict[str, Any] = {
        "edges": np.zeros(size, bool),
        "margins": np.full(size, np.inf),
        "turns": [],
        "drafts": None,
    }
    want = Reference(log_probs, np.zeros(size, np.int64), **plain)
    return replace(build(proof_of(np.zeros(size, np.int64), want, TOLERANCES[EXACT])), **more)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), vocab=st.integers(3, 60), spread=st.floats(0.1, 4), noise=st.floats(0, 1))
def test_the_distance_is_a_lower_bound_that_misses_only_the_tail(
    seed: int, vocab: int, spread: float, noise: float
) -> None:
    want = rows_of(seed, 5, vocab, spread)
    logits = want + np.random.default_rng(seed + 1).normal(0, noise, want.shape)
    got = np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)), np.float32)
    proof = proof_from(want)
    largest, kl, top1 = distances(proof, np.arange(5), got)
    true = whole_distances(want, got)
    assert largest <= true["max_abs_diff"] + 1e-6
    assert kl <= true["kl_mean"] + 1e-6
    if vocab <= TOP:  # all ids are known
        assert largest == pytest.approx(true["max_abs_diff"], abs=1e-6)
        assert kl == pytest.approx(true["kl_mean"], abs=2e-6)
    slow = []
    for row in range(5):
        known = {*proof.top_ids[row].tolist(), *proof.other_ids.tolist()}
        p, q = np.exp(want[row].astype(float)), np.exp(got[row].astype(float))
        pairs = [(p[v], q[v]) for v in known]
        left = [v for v in range(vocab) if v not in known]
        pairs += [(p[left].sum(), q[left].sum())] if left else []
        slow.append(sum(a * math.log(a / b) for a, b in pairs))
    assert kl == pytest.approx(max(0, np.mean(slow)), abs=2e-6)
    assert top1 == np.mean(want.argmax(1) == got.argmax(1))


# --- what is found ----------------------------------------------------------------------------------

ROWS = rows_of(1, 6, 40, 2.0)
NONE = np.zeros(6, np.int64)


def outcome(proof: Proof, log_probs: np.ndarray, routes: np.ndarray = NONE) -> str | None:
    return compared(WHOLE, proof, np.arange(6), log_probs, routes).failure


def test_each_limit_is_held() -> None:
    proof = proof_from(ROWS)
    assert outcome(proof, ROWS) is None
    first = int(proof.top_ids[2, 0])
    assert "the largest log-prob difference is 0.001, allowed 0.0001" in str(outcome(proof, nudged(2, first, 0.001)))
    far = replace(proof, tolerance=replace(proof.tolerance, max_abs=None))
    assert "the mean KL is at least" in str(outcome(far, nudged(2, first, -1.0)))
    loose = replace(far, tolerance=replace(proof.tolerance, max_abs=None, kl_mean=9))
    assert outcome(loose, nudged(2, first, 5e-3)) is None
    assert "17% of the positions have another likeliest token" in str(outcome(loose, nudged(2, first, -9.0)))
    assert "position 3 is nan" in str(outcome(proof, nudged(3, 7, np.nan)))
    assert "position 0 sum to" in str(outcome(loose, ROWS + 3))  # the KL of such rows is negative


def nudged(row: int, token: int, by: float) -> np.ndarray:
    changed = ROWS.copy()
    changed[row, token] += by
    return (
        np.asarray(changed - np.where(np.arange(6) == row, np.log(np.exp(changed).sum(1)), 0)[:, None], np.float32)
        if abs(by) > 0.01
        else changed
    )


def test_near_ties_of_gates_and_candidates_are_forgiven_and_clear_routes_are_not() -> None:
    other = np.where(np.arange(6) == 4, 1, 0)
    wrong = nudged(4, int(ROWS[4].argmax()), -3.0)
    margins = np.full(6, 0.9)
    part = compared(WHOLE, proof_from(ROWS, margins=np.where(other, 1e-5, 0.9)), np.arange(6), wrong, other)
    assert (part.failure, part.near_ties, part.positions) == (None, 1, 5)
    found = outcome(proof_from(ROWS, margins=margins), wrong, other)
    assert "1 of 6 positions take another path, first position 4 (path 1 instead of 0" in str(found)
    assert outcome(proof_from(ROWS, ties=other.astype(bool)), wrong) is None
    assert outcome(proof_from(ROWS), wrong) is not None
    tied = proof_from(ROWS, margins=np.zeros(6))
    assert "none of 6 positions takes the path" in str(outcome(tied, ROWS, np.ones(6, np.int64)))


def test_wrong_weights_fail_every_way_and_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.fromfile(folder / "model.onnx.data", np.float32)
    publish(folder, "model.onnx.data", (data * np.float32(1.001)).tobytes())
    assert set(failures(checked(folder))) == {WHOLE, STEPS, TOGETHER}
    closed: list[Model] = []
    monkeypatch.setattr(Model, "close", lambda self: closed.append(self))
    with pytest.raises(CheckError, match=r"computes something different .*text at once: .*onnxruntime 1") as error:
        runtime.load(folder, threads=1, self_check=True)
    assert error.value.exit_code == 4
    assert len(closed) == 1


def test_a_fault_of_batches_alone_is_found(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime 1.27 has one with int8 caches."""
    real = Batch.run

    def crossed(self: Batch, ids: Any, log_probs: np.ndarray) -> Any:
        routes = real(self, ids, log_probs)
        log_probs[:] = log_probs[::-1].copy()
        return routes

    monkeypatch.setattr(Batch, "run", crossed)
    assert set(failures(checked(exported))) == {TOGETHER}


def test_a_fault_of_single_steps_alone_is_found(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.sequence import Sequence

    real = Sequence.run

    def late(self: Sequence, ids: Any, log_probs: np.ndarray, *args: Any, **more: Any) -> Any:
        routes = real(self, ids, log_probs, *args, **more)
        if len(ids) == 1:
            log_probs += np.log(np.float32(1.0005))
        return routes

    monkeypatch.setattr(Sequence, "run", late)
    assert set(failures(checked(exported))) == {STEPS}


# --- folders without a proof, or with a damaged one -------------------------------------------------


def test_without_a_proof_the_message_says_why(checkpoint: Path, tmp_path: Path) -> None:
    export_onnx(checkpoint, tmp_path / "onnx", verify=False)
    assert not (tmp_path / "onnx" / PROOF_NAME).exists()
    with pytest.raises(ModelError, match=r"has no dmpt_proof\.json: .*--no-verify") as error:
        runtime.load(tmp_path / "onnx", threads=1, self_check=True)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format="x"), "has format 'x'"),
        (lambda raw: raw.update(format_version=2), "format_version 2; this program reads"),
        (lambda raw: raw.pop("rest"), "rest: missing"),
        (lambda raw: raw["ids"].append(VOCAB), "routes has 48 rows for 49 ids"),
        (lambda raw: raw["other_ids"].__setitem__(0, VOCAB), "id 97 of a vocabulary of 97"),
        (lambda raw: raw["top_ids"][3].pop(), "top_ids has uneven rows"),
        (lambda raw: raw["routes"].__setitem__(0, 2), "route 2 of 2 leaves"),
        (lambda raw: raw.update(prompt=49), "48 ids, 49 of them at once, context 64"),
        (lambda raw: raw.update(candidate_ties=[48]), "a tie at position 48 of 48"),
        (lambda raw: raw["tolerance"].update(kl_mean=None), "tolerance.kl_mean: None is not a number"),
        (lambda raw: raw["rest"].__setitem__(0, math.nan), "is not a finite number"),
        (lambda raw: raw["tolerance"].update(kl_mean=math.inf), "is not a finite number"),
    ],
)
def test_a_damaged_proof_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_proof(folder, change)
    with pytest.raises(ModelError, match=message):
        checked(folder)


@pytest.mark.parametrize(("content", "message"), [(b"{", "is not JSON"), (b"[" * (1 << 20) + b"[", "larger than 1 MB")])
def test_what_is_no_proof_is_refused(folder: Path, content: bytes, message: str) -> None:
    publish(folder, PROOF_NAME, content)
    with pytest.raises(ModelError, match=message):
        checked(folder)


def test_the_proof_of_gpt2s_vocabulary_stays_small() -> None:
    raw = proof_of(
        np.full(PROVEN, 50256),
        Reference(
            rows_of(0, PROVEN, 50257, 3.0), np.zeros(PROVEN, np.int64), edges=np.zeros(PROVEN, bool),
            margins=np.full(PROVEN, 0.123456789), turns=[], drafts=None,  # type: ignore[arg-type]
        ),
        TOLERANCES[EXACT],
    )  # fmt: skip
    assert len(raw["other_ids"]) == OTHERS
    assert len(json.dumps(raw)) < 20_000
