"""Perplexity by the stride-concat protocol, against a slow reference written from the protocol's text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.quality.checkpoint_scorer
from benchmarks.quality.divergence import standard_error
from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.perplexity import evaluate, read_tokens
from benchmarks.quality.protocols import choose_windows
from quant.checkpoint import dequantized_model, save_quantized
from tests.helpers.bench_fakes import FakeScorer, uniform
from tests.helpers.paths import SHARED_DATA
from tests.helpers.tolerances import TOLERANCE
from training.errors import InputError, ValidationError
from training.text.tokenizer import load_tokenizer
from training.text.windows import encode_lines, windows


def slow_reference(model: Any, ids: list[int], max_length: int, stride: int) -> tuple[float, int, int]:
    """(sum of log-probs, scored, right), one token at a time, from the protocol's text alone.

    "Windows of 1024 tokens advancing by 512, scoring the last 512 predictions of each (the last window: what is
    left); the first 512 tokens are never scored and end-of-text targets count."
    """
    total, scored, right = 0.0, 0, 0
    model = model.double()
    for target in range(max_length - stride, len(ids)):
        start = 0
        while start + max_length <= target:  # the first window that reaches the target
            start += stride
        before = torch.tensor([ids[start:target]])
        if not before.numel():  # a window's first token, when windows do not overlap: nothing to predict it from
            continue
        with torch.no_grad():
            log_probs = model(before).logits[0, -1].log_softmax(-1)
        total += log_probs[ids[target]].item()
        right += int(log_probs.argmax() == ids[target])
        scored += 1
    return total, scored, right


@pytest.mark.parametrize(
    ("max_length", "stride", "n"),
    [(64, 32, 230), (48, 16, 200), (30, 7, 119), (20, 20, 90), (64, 1, 80), (64, 32, 33), (64, 32, 50), (64, 32, 64)],
)
def test_a_gpt2_folder_scores_as_the_slow_loop(
    tiny_gpt2: Path, sample_text: str, max_length: int, stride: int, n: int
) -> None:
    from transformers import GPT2LMHeadModel

    scorer = open_scorer(tiny_gpt2)
    ids = encode_lines(sample_text, scorer.tokenizer, scorer.end_of_text)[:n]
    assert len(ids) == n
    found = evaluate(scorer, ids, max_length, stride)
    total, scored, right = slow_reference(
        GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval(), ids.tolist(), max_length, stride
    )
    assert found.tokens_scored == scored
    assert found.sum_log_prob == pytest.approx(total, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(-total / scored), rel=1e-6)
    assert found.accuracy == right / scored


def test_wikitext_scores_as_many_tokens_as_the_original() -> None:
    text, folder = SHARED_DATA / "wikitext" / "wiki.test.raw", SHARED_DATA / "gpt2-tokenizer"
    if not (text.is_file() and (folder / "vocab.json").is_file()):
        pytest.skip("WikiText and GPT-2's tokenizer are not beside the repository (../shared/data)")
    ids = encode_lines(text, load_tokenizer(folder), 50256)
    assert len(ids) == 280_744
    assert sum(n for _, _, n in windows(len(ids), 1024, 512)) == 280_232


def test_a_uniform_model_scores_the_vocabulary_size() -> None:
    found = evaluate(FakeScorer(uniform(97), 97), np.arange(500) % 97)
    n = 500 - 32
    assert found.tokens_scored == n
    assert found.mean_nll == pytest.approx(math.log(97), rel=1e-7)  # float32's rounding of log(97)
    assert found.perplexity == pytest.approx(97, rel=1e-6)
    assert found.standard_error < 1e-12


def test_every_token_is_scored_once_with_enough_before_it() -> None:
    """A rule that gives each token the length of its context as loss, so the sums show where each was scored."""

    def rule(ids: np.ndarray) -> np.ndarray:
        return np.repeat(-np.arange(1, len(ids) + 1, dtype=np.float32)[:, None], 500, axis=1)

    scorer = FakeScorer(rule, 500, context=64)
    ids = np.arange(300)
    found = evaluate(scorer, ids, 40, 10)
    before = found.nll.astype(int).tolist()  # tokens before each scored one
    assert before == [*range(30, 40)] + [*range(30, 40)] * 26
    for asked, last in scorer.asked:
        assert asked == list(range(asked[0], asked[0] + len(asked)))
        assert len(asked) - last >= 29


def test_accuracy_and_error_by_hand() -> None:
    """Token t is followed by t + 1 with probability 1/2 or, in every third place, 1/8 and not the likeliest."""

    def rule(ids: np.ndarray) -> np.ndarray:
        probs = np.full((len(ids), 50), 1e-6, np.float32)
        for row, t in zip(probs, ids, strict=True):
            good = t % 3 != 0
            row[(t + 1) % 50] = 0.5 if good else 0.125
            row[(t + 2) % 50] = 0.25
        return np.log(probs)

    found = evaluate(FakeScorer(rule, 50), np.arange(13), 6, 3)  # targets 3..12, predicted from 2..11
    bad = 3  # from 3, 6, 9
    nll = np.where(np.arange(2, 12) % 3 == 0, np.log(8), np.log(2))
    assert found.tokens_scored == 10
    assert found.accuracy == pytest.approx((10 - bad) / 10)
    assert found.sum_log_prob == pytest.approx(-nll.sum(), rel=1e-6)
    assert found.standard_error == pytest.approx(np.sqrt(((nll - nll.mean()) ** 2).sum() / 9 / 10), rel=1e-6)
    assert standard_error(np.array([2.0])) == 0


def test_route_shares_count_scored_tokens_only() -> None:
    scorer = FakeScorer(uniform(50), 50, context=8, routes=lambda ids: (np.asarray(ids) >= 10).astype(np.int64))
    found = evaluate(scorer, np.arange(20), 8, 4)  # targets 4..19 from 3..18: 7 before 10, 9 from 10 on
    assert found.route_shares == {"left": 7 / 16, "right": 9 / 16}


def test_default_windows() -> None:
    assert choose_windows(1024, None, None) == (1024, 512)
    assert choose_windows(4096, None, None) == (1024, 512)
    assert choose_windows(64, None, None) == (64, 32)
    assert choose_windows(64, None, 5) == (64, 5)


@pytest.mark.parametrize(("max_length", "stride"), [(65, None), (1, None), (None, 65), (8, 9)])
def test_windows_that_cannot_be_are_refused(max_length: int | None, stride: int | None) -> None:
    with pytest.raises(InputError, match="must be from"):
        choose_windows(64, max_length, stride)


@pytest.mark.parametrize("n", [2, 20, 32])
def test_a_text_with_nothing_to_score_is_refused(n: int) -> None:
    with pytest.raises(InputError, match=r"longer text.*max_length"):
        evaluate(FakeScorer(uniform(50), 50), np.arange(n))
    assert evaluate(FakeScorer(uniform(50), 50), np.arange(33)).tokens_scored == 1


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match="token 50 is beyond"):
        evaluate(FakeScorer(uniform(50), 50), np.arange(51))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_log_probs_that_are_no_numbers_fail_the_check(value: float) -> None:
    def rule(ids: np.ndarray) -> np.ndarray:
        out = uniform(50)(ids)
        out[:, 40] = value
        return out

    with pytest.raises(ValidationError, match="token 40"):
        evaluate(FakeScorer(rule, 50), np.arange(50))


def test_a_loss_beyond_any_perplexity_fails_the_check() -> None:
    with pytest.raises(ValidationError, match="1000 nats"):
        evaluate(FakeScorer(lambda ids: np.full((len(ids), 50), -1000, np.float32), 50), np.arange(50))


def test_a_foreign_tokenizer_and_bad_files_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    scorer = FakeScorer(uniform(200), 200, tokenizer=load_tokenizer(tokenizer_folder))
    good = tmp_path / "good.txt"
    good.write_text("one line\n\nanother\n")
    with pytest.raises(InputError, match="do not belong together"):
        read_tokens(scorer, [good])
    scorer = FakeScorer(uniform(300), 300, tokenizer=scorer.tokenizer)
    assert (read_tokens(scorer, [good]) == 0).sum() == 2  # one end-of-text a line
    for name, content in {"empty.txt": b"\n \n", "latin.txt": b"caf\xe9\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_tokens(scorer, [tmp_path / name])
    with pytest.raises(InputError, match="missing"):
        read_tokens(scorer, [tmp_path / "missing"])


# --- scorers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["tiny_dmpt", "tiny_quad", "tiny_gpt2"])
def test_torch_scores_are_the_deployed_distribution(
    folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmpt_export.onnx.sizes import touched_per_token
    from training.checkpoints.checkpoint import load_model, load_state

    path = request.getfixturevalue(folder)
    model, (config, state) = load_model(path), load_state(path)
    monkeypatch.setattr(benchmarks.quality.checkpoint_scorer, "ROWS_AT_ONCE", 7)  # chunks of rows, the last one short
    scorer = open_scorer(path)
    ids = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(3))
    log_probs, routes = scorer.score(ids.numpy(), 30)
    with torch.no_grad():
        expected = model.log_probs(ids[None], fast_k=model.config.fast_k)[0, -30:].numpy()
        gates = model.hidden(ids[None]).gates
        leaves = model.routes(gates)[0, -30:].tolist() if gates else [0] * 30
    assert routes is not None
    assert routes.tolist() == leaves
    assert len(set(leaves)) > 1 or config.leaves == ["root"]
    np.testing.assert_allclose(log_probs, expected, atol=TOLERANCE["float32", "torch"])
    assert scorer.parameters == sum(array.size for array in state.values())
    assert scorer.parameters_touched_per_token == touched_per_token(config, state)[0]
    assert scorer.family == ("GPT-2" if folder == "tiny_gpt2" else "DMPT")
    assert scorer.size_bytes == (path / "model.safetensors").stat().st_size


def test_other_path_modes(tiny_dmpt: Path) -> None:
    from training.checkpoints.checkpoint import load_model

    ids = np.arange(20)
    for mode in ("gate_soft", "left_only", "max_prob"):
        log_probs, routes = open_scorer(tiny_dmpt, mode=mode).score(ids, 5)
        with torch.no_grad():
            expected = load_model(tiny_dmpt).log_probs(torch.tensor(ids)[None], mode, 16, 5)[0].numpy()
        np.testing.assert_allclose(log_probs, expected, atol=TOLERANCE["float32", "torch"])
        assert routes is None
    with pytest.raises(InputError, match="unknown path mode"):
        open_scorer(tiny_dmpt, mode="middle_only")


def test_random_routing_is_scored_by_the_leaves_it_names(tiny_dmpt: Path) -> None:
    ids = np.arange(40) * 7 % 300
    log_probs, routes = open_scorer(tiny_dmpt, mode="random").score(ids, 30)
    assert routes is not None
    assert set(routes.tolist()) == {0, 1}
    for i, leaf in enumerate(("left", "right")):
        only, _ = open_scorer(tiny_dmpt, mode=f"{leaf}_only").score(ids, 30)
        np.testing.assert_allclose(log_probs[routes == i], only[routes == i], atol=TOLERANCE["float32", "torch"])


def test_fast_k_instead_of_the_checkpoints(tiny_dmpt: Path) -> None:
    from training.checkpoints.checkpoint import load_model

    ids, model = np.arange(20), load_model(tiny_dmpt)
    touched = []
    for fast_k in (None, 0, 5, 300):
        scorer = open_scorer(tiny_dmpt, fast_k=fast_k)
        touched.append(scorer.parameters_touched_per_token)
        with torch.no_grad():
            want = 16 if fast_k is None else fast_k or None
            expected = model.log_probs(torch.tensor(ids)[None], "gate_hard", want, 5)[0].numpy()
        np.testing.assert_allclose(scorer.score(ids, 5)[0], expected, atol=TOLERANCE["float32", "torch"])
    default, off, few, every = touched
    assert off == every == default + (300 - 16) * 32
    assert few == default - (16 - 5) * 32
    with pytest.raises(InputError, match="fast_k 301"):
        open_scorer(tiny_dmpt, fast_k=301)


def test_a_quantized_folder_is_opened_as_its_torch_reference(tiny_dmpt: Path, tmp_path: Path) -> None:
    save_quantized(tiny_dmpt, tmp_path / "q", "int8")
    scorer = open_scorer(tmp_path / "q")
    ids = np.arange(40, dtype=np.int64)
    model = dequantized_model(tmp_path / "q")
    expected = model.log_probs(torch.as_tensor(ids)[None], fast_k=model.config.fast_k)[0].detach().numpy()
    assert scorer.scheme == "int8"
    assert np.allclose(scorer.score(ids, 40)[0], expected, atol=1e-6)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=str(path)):
            open_scorer(path)
