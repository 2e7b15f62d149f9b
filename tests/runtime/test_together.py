"""Texts that join and leave a batch at any step are those that each prompt gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import ModelError, RequestError
from runtime.model import Model
from runtime.sampling import Sampling
from runtime.together import Together
from runtime.writing import Limits, Token, Writing
from tests.helpers.exports import endless_models

CONTEXT, VOCAB = 64, 97
TREES: dict[str, dict[str, Any]] = {
    "none": {"splits": [], "heads": 1},
    "quad": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    with endless_models(tmp_path_factory.mktemp("together"), TREES) as loaded:
        yield loaded


def text_of(model: Model, prompt: list[int], most: int, on_full: str = "stop", seed: int = 0) -> Writing:
    return Writing(model, np.array(prompt), Sampling(seed=seed), Limits(most, on_full=on_full), 0)


PROMPT = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=CONTEXT)


@pytest.mark.parametrize("tree", TREES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_coming_and_going_gives_what_each_prompt_gives_alone(
    tree: str, models: dict[str, Model], data: st.DataObject
) -> None:
    model, rows = models[tree], data.draw(st.integers(1, 4))
    together = Together(model, rows, piece=data.draw(st.sampled_from([None, 1, 7, 64])))
    texts: list[Writing] = []
    dropped: set[Writing] = set()
    got: dict[Writing, list[int]] = {}
    for _ in range(data.draw(st.integers(5, 60))):
        act = data.draw(st.sampled_from(["enter", "step", "step", "step", "drop"]))
        if act == "enter" and len(together) < rows:
            how = data.draw(PROMPT), data.draw(st.integers(1, 20)), data.draw(st.sampled_from(["stop", "slide"]))
            texts.append(text_of(model, *how, seed=len(texts)))
            together.enter(texts[-1])
        elif act == "drop" and texts:
            text = data.draw(st.sampled_from(texts))
            together.drop(text)
            if text.stop_reason is None:
                dropped.add(text)
        for text, token in together.step() if act == "step" else ():
            assert isinstance(token, Token)
            assert text not in dropped
            got.setdefault(text, []).append(token.id)
    while len(together):
        for text, token in together.step():
            assert isinstance(token, Token)
            got.setdefault(text, []).append(token.id)
    for number, text in enumerate(texts):
        assert (text in dropped) == (text.stop_reason is None)
        limits = {"max_new_tokens": text.limits.max_new_tokens, "on_full": text.limits.on_full}
        alone = model.generate(text.prompt.tolist(), seed=number, **limits)
        assert got.get(text, []) == alone[: len(got.get(text, []))]
        assert text in dropped or got[text] == alone


def test_a_long_prompt_is_read_in_pieces_beside_the_others(models: dict[str, Model]) -> None:
    """So many tokens a step, each of which gives the others a token."""
    model = models["quad"]
    together = Together(model, 4, piece=10)
    first, long, short = text_of(model, [1, 2], 60), text_of(model, [3] * 36, 5), text_of(model, [4] * 3, 5)
    together.enter(first)
    assert [text for text, _ in together.step()] == [first]
    together.enter(long)
    together.enter(short)
    made = [{text for text, _ in together.step()} for _ in range(6)]
    # 35 tokens before the last one: 10, 10, 10, and 5 with the other prompt's 2 in the same step
    assert made == [{first}, {first}, {first}, {first, long, short}, {first, long, short}, {first, long, short}]


def test_a_text_that_the_model_ruins_leaves_alone(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["none"]
    together = Together(model, 3)
    texts = [text_of(model, [n + 1], 6, seed=n) for n in range(3)]
    for text in texts:
        together.enter(text)
    together.step()
    take = texts[1].take
    monkeypatch.setattr(texts[1], "take", lambda log_probs, *more: take(np.full_like(log_probs, np.nan), *more))
    made = dict(together.step())
    assert isinstance(made[texts[1]], ModelError)
    while len(together):
        assert texts[1] not in dict(together.step())
    assert texts[0].ids == model.generate([1], 6, seed=0)
    assert texts[2].ids == model.generate([3], 6, seed=2)


def test_no_more_texts_than_rows(models: dict[str, Model]) -> None:
    together = Together(models["none"], 1)
    assert together.step() == []
    together.enter(text_of(models["none"], [1], 2))
    with pytest.raises(RequestError, match="all 1 rows are in use"):
        together.enter(text_of(models["none"], [1], 2))


def test_a_batch_grows_back_to_the_rows_that_it_began_with(models: dict[str, Model]) -> None:
    batch = models["quad"].batch(3)
    batch.feed([[1, 2], [3], [4, 5, 6]])
    batch.resize(1)
    assert batch.lengths.tolist() == [2]
    batch.resize(2)
    assert batch.lengths.tolist() == [2, 0]
    log_probs, _ = batch.feed([[7], [8, 9]])
    np.testing.assert_allclose(log_probs[0], models["quad"].log_probs([1, 2, 7])[-1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(log_probs[1], models["quad"].log_probs([8, 9])[-1], rtol=0, atol=1e-4)
    with pytest.raises(RequestError, match="rows 4 must be a whole number, from 1 to 3"):
        batch.resize(4)
