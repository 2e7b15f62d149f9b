"""KL from a base, its cache, the state of a killed evaluation, batches, and use of paths and heads."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import benchmarks.quality.divergence
import benchmarks.quality.perplexity
from benchmarks.quality.divergence import Base, check_base, kl_divergence, pack, unpack
from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.perplexity import Resume, evaluate
from benchmarks.quality.scorer import Piece
from dmpt_export.cli.main import main
from tests.helpers.bench_fakes import FakeScorer, uniform
from tests.helpers.tolerances import TOLERANCE
from training.errors import InputError, ValidationError

IDS = np.arange(300) * 7 % 300


@pytest.fixture
def text(sample_text: str, tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(sample_text, encoding="utf-8")
    return str(tmp_path / "text.txt")


def slow_comparison(base: Any, model: Any, ids: np.ndarray, length: int, stride: int) -> dict[str, Any]:
    """From the definitions, one row at a time, in float64: windows that each score their last `stride`."""
    kl, same, ratio = [], [], []
    for start in range(0, len(ids) - (length - stride), stride):
        window = ids[start : start + length]
        n = min(stride, len(window) - (length - stride))
        rows = [scorer.score(window[:-1], n)[0].astype(np.float64) for scorer in (base, model)]
        for target, b, m in zip(window[-n:], *rows, strict=True):
            p = np.exp(b) / np.exp(b).sum()
            q = np.exp(m) / np.exp(m).sum()
            kl.append(sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True)))
            same.append(b.argmax() == m.argmax())
            ratio.append(b[target] - m[target])
    n = len(kl)
    mean = sum(ratio) / n
    return {
        "kl_mean": sum(kl) / n,
        "kl_median": float(np.median(kl)),
        "kl_99": float(np.quantile(kl, 0.99)),
        "kl_max": max(kl),
        "top1_agreement": sum(same) / n,
        "log_ratio": mean,
        "log_ratio_error": math.sqrt(sum((r - mean) ** 2 for r in ratio) / (n - 1) / n),
    }


def test_kl_is_that_of_the_slow_loop(tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path) -> None:
    base, model = open_scorer(tiny_gpt2), open_scorer(tiny_dmpt)
    expected = slow_comparison(base, model, IDS, 32, 16)
    found = evaluate(model, IDS, 32, 16, base=Base(base)).base
    assert found is not None
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(evaluate(base, IDS, 32, 16).perplexity, rel=1e-12)
    for _ in range(2):  # written, then read back: the same numbers
        kept = evaluate(model, IDS, 32, 16, base=Base(base, tmp_path / "cache")).base
        assert kept is not None
        assert {key: kept[key] for key in expected} == pytest.approx(expected, rel=1e-3)
        assert kept["log_ratio"] == found["log_ratio"]
        base.score = base.pieces = None  # type: ignore[method-assign, assignment]  # no longer asked
    itself = evaluate(model, IDS, 32, 16, base=Base(open_scorer(tiny_dmpt))).base
    assert itself is not None
    assert itself["kl_max"] < 1e-6
    assert itself["top1_agreement"] == 1


@given(seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_packing_is_as_exact_as_it_says(seed: int, scale: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, 40)).astype(np.float32) * np.float32(scale)
    rows = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)).astype(np.float32)
    back = unpack(*pack(rows))
    top = rows.max(-1, keepdims=True)
    step = np.sqrt((top - rows) * (top - rows.min(-1, keepdims=True))) / 65_535
    assert (np.abs(back - rows) <= step + 1e-5 * scale).all()
    assert (back.max(-1) == rows.max(-1)).all()
    assert (back.argmax(-1) == rows.argmax(-1)).all()
    assert np.abs(kl_divergence(back, rows)).max() < 1e-4


def test_no_probability_at_all() -> None:
    with np.errstate(divide="ignore"):
        certain = np.log(np.array([[1.0, 0.0, 0.0]], np.float32))
    even = np.full((1, 3), -np.log(3), np.float32)
    assert kl_divergence(certain, even) == pytest.approx(math.log(3))
    assert kl_divergence(certain, certain) == 0
    kept = np.log(np.array([[1, 0, 0], [0.5, 0.5, 0]], np.float32), where=[[True, False, False], [True, True, False]],
                  out=np.full((2, 3), -np.inf, np.float32))  # fmt: skip
    np.testing.assert_allclose(np.exp(unpack(*pack(kept))), np.exp(kept), rtol=1e-6, atol=1e-30)
    assert np.isinf(kl_divergence(even, certain))
    fake = FakeScorer(lambda ids: np.where(np.eye(50)[(ids + 1) % 50] > 0, 0, -np.inf).astype(np.float32), 50)
    with pytest.raises(ValidationError, match="gives probability 0 to a token"):
        evaluate(fake, np.arange(50), base=Base(FakeScorer(uniform(50), 50)))


def test_a_base_serves_again_after_a_model_that_failed() -> None:
    """Rows left over from a failed evaluation are not used for the next one."""

    def base() -> Base:
        return Base(FakeScorer(lambda ids: np.log((1 + np.eye(50)[ids]) / 51).astype(np.float32), 50))

    def broken_off(windows: Any) -> Any:
        for ids, last in windows:
            yield Piece(uniform(50)(ids[:3]), None)
            yield Piece(np.full((last - 3, 50), np.nan, np.float32), None)

    model, broken, used = FakeScorer(uniform(50), 50), FakeScorer(uniform(50), 50), base()
    broken.pieces = broken_off  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="gives token"):
        evaluate(broken, np.arange(50), 16, 8, base=used)
    after, fresh = (evaluate(model, np.arange(50), 16, 8, base=b).base for b in (used, base()))
    assert after == fresh


def test_a_cache_is_never_another_models_texts_or_windows(tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path) -> None:
    base, model, cache = open_scorer(tiny_gpt2), open_scorer(tiny_dmpt), tmp_path / "cache"

    def folders(*arguments: Any, ids: np.ndarray = IDS, base: Any = base, **options: Any) -> int:
        evaluate(model, ids, *arguments, base=Base(base, cache), **options)
        return len(list(cache.iterdir()))

    assert folders(32, 16) == folders(32, 16) == 1
    assert folders(32, 8) == 2
    assert folders(32, 16, protocol="sliding") == 3
    assert folders(32, 16, ids=IDS[::-1]) == 4
    assert folders(32, 16, base=open_scorer(tiny_dmpt)) == 5
    assert folders(32, 16, base=open_scorer(tiny_dmpt, fast_k=3)) == 6
    assert folders(32, 16, base=open_scorer(tiny_dmpt, mode="left_only")) == 7


@pytest.mark.parametrize("fault", ["permuted", "cut", "changed"])
def test_a_cache_that_was_tampered_with_is_refused(
    fault: str, tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path
) -> None:
    base, model = Base(open_scorer(tiny_gpt2), tmp_path), open_scorer(tiny_dmpt)
    evaluate(model, IDS, 32, 16, base=base)
    first, second, *_ = sorted(tmp_path.glob("base-*/*"))
    data = first.read_bytes()
    if fault == "permuted":
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    else:
        half = len(data) // 2
        first.write_bytes(data[:half] + (b"" if fault == "cut" else bytes([data[half] ^ 1]) + data[half + 1 :]))
    with pytest.raises(InputError, match=rf"{first.name} (is damaged|holds the log-probs of a different).*delete"):
        evaluate(model, IDS, 32, 16, base=base)


def test_a_base_that_does_not_fit_is_refused(
    tiny_gpt2: Path, make_gpt2: Callable[..., Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_gpt2(tmp_path / "wide", vocab_size=310)
    make_gpt2(tmp_path / "short", n_positions=32)
    for other, said in (("wide", "310 tokens"), ("short", "context of 32")):
        assert (
            main(["eval", str(tiny_gpt2), "--data", text, "--max-length", "64", "--base", str(tmp_path / other)]) == 3
        )
        assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="different tokens"):
        check_base(FakeScorer(uniform(9), 9), FakeScorer(uniform(9), 9), np.arange(5), np.arange(6))
    assert main(["eval", str(tiny_gpt2), "--data", text, "--base-cache", str(tmp_path / "c")]) == 2


def test_a_full_disk(
    tiny_gpt2: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    arguments = ["eval", str(tiny_gpt2), "--data", text, "--base", str(tiny_gpt2), "--base-cache", str(cache)]
    with monkeypatch.context() as patched:
        patched.setattr(benchmarks.quality.divergence, "SPARE", 1 << 60)
        assert main(arguments) == 5
        assert "MB are free" in capsys.readouterr().err
        assert not cache.exists()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        for command_line in (arguments, [*arguments[:4], "--resume", str(tmp_path / "state")]):
            assert main(command_line) == 5
            assert "No space left" in capsys.readouterr().err
    assert not list(cache.glob("*/*"))
    assert not list(tmp_path.glob("state/*"))
    assert main(arguments) == 0


# --- going on -----------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_to_the_same_digits(
    tiny_dmpt: Path,
    tiny_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command_of(*more: str) -> list[str]:
        models = [str(tiny_dmpt), "--data", str(tmp_path / "text"), "--base", str(tiny_gpt2)]
        return ["eval", *models, "--max-length", "32", "--stride", "2", "--batch", "3", "--json", *more]

    (tmp_path / "text").write_text("The tide mill turns the wheel .\n" * 12, encoding="utf-8")
    dying = (
        "import os, signal, sys\n"
        "import benchmarks.quality.progress as progress, benchmarks.quality.perplexity as quality\n"
        "progress.EVERY_S = 0\n"
        "pieces, seen = quality.pieces, []\n"
        "def dying(scorer, windows):\n"
        "    seen.append(windows)\n"
        "    for piece in pieces(scorer, windows):\n"
        "        yield piece\n"
        "        if len(seen) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "quality.pieces = dying\n"
        "from dmpt_export.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    pieces, seen = benchmarks.quality.perplexity.pieces, []
    monkeypatch.setattr(
        benchmarks.quality.perplexity, "pieces", lambda scorer, asked: seen.append(asked) or pieces(scorer, asked)
    )

    def run(*more: str) -> tuple[dict[str, Any], int]:
        seen.clear()
        assert main(command_of(*more)) == 0
        return json.loads(capsys.readouterr().out), len(seen)

    whole, batches = run()
    state = tmp_path / "state"
    victim = subprocess.run([sys.executable, "-c", dying, *command_of("--resume", str(state))], capture_output=True)
    assert victim.returncode == -signal.SIGKILL
    assert [file.name[:5] for file in state.iterdir() if not file.name.endswith(".lock")] == ["eval-"]
    assert run("--resume", str(state)) == (whole, batches - 4)
    assert not list(state.iterdir())


def test_an_interrupt_keeps_what_was_found(tiny_dmpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = open_scorer(tiny_dmpt)
    whole, real, calls = evaluate(scorer, IDS, 32, 16), type(scorer).pieces, []

    def stopping(self: Any, windows: Any) -> Any:
        calls.append(windows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, windows)

    with monkeypatch.context() as patched:
        patched.setattr(type(scorer), "pieces", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(scorer, IDS, 32, 16, resume=Resume(tmp_path))
    (state,) = tmp_path.iterdir()
    other = evaluate(open_scorer(tiny_dmpt, fast_k=3), IDS, 32, 16, resume=Resume(tmp_path))  # not its state
    assert other.sum_log_prob != whole.sum_log_prob
    assert state.exists()
    kept = state.read_bytes()
    assert np.array_equal(evaluate(scorer, IDS, 32, 16, resume=Resume(tmp_path)).nll, whole.nll)
    state.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(InputError, match=rf"{state.name} is damaged.*delete"):
        evaluate(scorer, IDS, 32, 16, resume=Resume(tmp_path))


@pytest.mark.parametrize("mode", ["gate_hard", "gate_soft"])
def test_a_batch_changes_nothing(mode: str, tiny_dmpt: Path) -> None:
    for protocol in ("stride-concat", "sliding"):  # with windows that are shorter, or score more, than the others
        scorer = open_scorer(tiny_dmpt, mode=mode)
        one, many = (evaluate(scorer, IDS, 32, 12, protocol, batch) for batch in (1, 5))
        np.testing.assert_allclose(many.nll, one.nll, atol=TOLERANCE["float32", "torch"])
        assert (many.accuracy, many.route_shares) == (one.accuracy, one.route_shares)


# --- what is used -------------------------------------------------------------------------------------


def test_use_of_paths_and_heads(tiny_quad: Path) -> None:
    import torch

    scorer = open_scorer(tiny_quad)
    found = evaluate(scorer, IDS[:48], 48, 20)
    model, rows = scorer.model, slice(27, 47)  # type: ignore[attr-defined]
    with torch.no_grad():
        hidden = model.hidden(torch.tensor(IDS[None, :48]))
        routes = model.routes(hidden.gates)[0, rows]
        switched = [before != after for before, after in itertools.pairwise(routes.tolist())]
        assert found.switch_share == pytest.approx(sum(switched) / 19, rel=1e-12)
        for i, (leaf, heads) in enumerate(model.config.head_allocation.items()):
            mine = (routes == i).numpy()
            assert found.route_shares[leaf] == mine.mean()
            if mine.any():
                assert found.path_perplexity[leaf] == pytest.approx(math.exp(found.nll[mine].mean()), rel=1e-12)
                weights = model.head_log_weights(leaf, hidden.leaves[leaf][0, rows])[mine].exp().mean(0)
                assert found.head_shares is not None
                assert [found.head_shares[leaf][j] for j in heads] == pytest.approx(weights.tolist(), rel=1e-5)
    model.config.head_allocation = dict(reversed(model.config.head_allocation.items()))  # not the leaves' order
    assert evaluate(scorer, IDS[:48], 48, 20).head_shares == found.head_shares
    mixed = sum(share * math.log(found.path_perplexity.get(leaf, 1)) for leaf, share in found.route_shares.items())
    assert mixed == pytest.approx(found.mean_nll, rel=1e-12)


def test_what_people_read(tiny_dmpt: Path, tiny_gpt2: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_dmpt), "--data", text, "--base", str(tiny_gpt2), "--protocol", "sliding"]) == 0
    said = capsys.readouterr().out
    for words in ("(sliding, windows of 64, stride 32)", "per word", "bits (", "top five", "heads left", "KL", "99 %",
                  "same top", "ln ratio"):  # fmt: skip
        assert words in said
