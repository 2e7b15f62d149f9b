"""Compare generation with a slow loop that scores the whole text again for every token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from dmpt_export.onnx.export import export_onnx
from runtime.errors import RequestError
from runtime.model import Model
from runtime.sampling import Sampler, Sampling

PROMPT = "The tide mill"


@pytest.fixture(scope="module")
def model(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    out = tmp_path_factory.mktemp("generate") / "onnx"
    export_onnx(tiny_dmpt, out, verify=False)
    with runtime.load(out, threads=1) as loaded:
        yield loaded


def slow(model: Model, ids: list[int], count: int, **options: Any) -> list[int]:
    """Without a cache: every token comes from scoring the whole preceding text again."""
    sampler = Sampler(Sampling(**options), ids)
    new: list[int] = []
    while len(new) < count and len(ids) + len(new) <= model.context:
        new.append(sampler(model.log_probs(ids + new)[-1]))
        if new[-1] == model.end_of_text:
            break
    return new


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "seed": 3},
        {"top_k": 5, "seed": 4},
        {"top_p": 0.8, "seed": 5},
        {"min_p": 0.05, "logit_bias": {7: 2.5, 9: -100.0}, "seed": 7},
        {"repetition_penalty": 1.5},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 6},
    ],
)
@pytest.mark.parametrize("prompt", [[5], [7, 8, 9, 10, 11]])
def test_generation_equals_the_slow_loop(model: Model, prompt: list[int], options: dict[str, Any]) -> None:
    want = slow(model, prompt, 30, **options)
    assert len(want) > 3
    assert model.generate(prompt, max_new_tokens=30, **options) == want


def test_text_for_text_and_ids_for_ids(model: Model) -> None:
    ids = model.encode(PROMPT)
    new = model.generate(ids, max_new_tokens=20)
    text = model.generate(PROMPT, max_new_tokens=20)
    assert isinstance(new, list)
    assert all(type(token) is int for token in new)
    assert text == model.decode(new)


@pytest.mark.parametrize("seed", range(6))
def test_on_token_sees_every_token_and_the_whole_text(model: Model, seed: int) -> None:
    calls: list[tuple[int, str]] = []
    text = model.generate(PROMPT, max_new_tokens=25, seed=seed, on_token=lambda *call: calls.append(call))
    assert [token for token, _ in calls] == model.generate(model.encode(PROMPT), max_new_tokens=25, seed=seed)
    assert "".join(piece for _, piece in calls) == text == model.decode([token for token, _ in calls])
    assert "\ufffd" in text or seed  # a random model writes half characters: the test covers them


def test_paths_are_those_of_scoring(model: Model) -> None:
    generation = model.stream(PROMPT, max_new_tokens=30, seed=1)
    paths = [token.path for token in generation]
    ids = [*generation.prompt.tolist(), *generation.ids]
    assert paths == model.routes(ids)[len(generation.prompt) - 1 : -1]
    assert set(paths) == {"left", "right"}


def seed_that_ends(model: Model) -> int:
    """The tests below need a text that reaches the end-of-text token, id 0."""
    for seed in range(300):
        ids = model.generate([5], max_new_tokens=40, temperature=1.5, seed=seed)
        if 2 < len(ids) < 40:
            return seed
    pytest.fail("no seed ends its text")


def test_end_of_text_stops_and_is_reported_without_text(model: Model) -> None:
    generation = model.stream([5], max_new_tokens=40, temperature=1.5, seed=seed_that_ends(model))
    tokens = list(generation)
    assert generation.stop_reason == "end_of_text"
    assert tokens[-1].id == model.end_of_text == generation.ids[-1]
    assert generation.ids.count(0) == 1
    assert generation.text == model.decode(generation.ids[:-1])


def test_the_number_of_tokens_is_kept(model: Model) -> None:
    generation = model.stream([5], max_new_tokens=4)
    assert [token.id for token in generation] == slow(model, [5], 4)
    assert generation.stop_reason == "max_new_tokens"


@pytest.mark.parametrize("length", [1, 60, 63, 64])
def test_the_end_of_the_context_stops(model: Model, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token needs no room: it is chosen when the context is full, and never fed."""
    monkeypatch.setattr(model, "end_of_text", None)
    prompt = np.random.default_rng(2).integers(1, 300, length).tolist()
    generation = model.stream(prompt, max_new_tokens=1000, seed=1)
    new = [token.id for token in generation]
    assert generation.stop_reason == "context_full"
    assert len(prompt) + len(new) == model.context + 1
    assert new == slow(model, prompt, 1000, seed=1)


def test_stop_strings_cut_the_text(model: Model) -> None:
    text = model.generate(PROMPT, max_new_tokens=40, seed=2)
    assert isinstance(text, str)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    pieces: list[str] = []
    generation = model.stream(PROMPT, max_new_tokens=40, seed=2, stop=["never seen", stop])
    pieces = [token.text for token in generation]
    assert generation.stop_reason == "stop_string"
    assert generation.text == text[: text.index(stop)] == "".join(pieces)
    assert model.generate(PROMPT, max_new_tokens=40, seed=2, stop=stop) == generation.text
    assert model.generate(PROMPT, max_new_tokens=40, seed=2, stop=iter([stop])) == generation.text
    assert model.generate(PROMPT, max_new_tokens=40, seed=2, stop="never seen") == text


def test_seeds(model: Model) -> None:
    assert model.generate(PROMPT, seed=9) == model.generate(PROMPT, seed=9) != model.generate(PROMPT, seed=10)


def test_a_generation_is_made_once(model: Model) -> None:
    generation = model.stream([5], max_new_tokens=2)
    list(generation)
    with pytest.raises(RequestError, match="already generated"):
        next(iter(generation))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("x" * 300, {}, "tokens do not fit the context of 64"),
        ("x" * 20_000, {}, "20000 bytes, a context of 64 tokens holds at most 16384"),
        ("a\udc80", {}, "not valid UTF-8"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens 0"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
        ("a", {"temperature": -1}, "temperature -1"),
        ("a", {"top_p": 2}, "top_p 2"),
        ("a", {"logit_bias": {10**6: 1.0}}, "logit_bias for token 1000000: this model's tokens are 0 to"),
        ("a", {"stop": [""]}, "stop string"),
        ("a", {"stop": [3]}, "stop string"),
        ("a", {"stop": 3}, "stop string"),
        ("a", {"stop": None}, "stop string"),
        ("a", {"temperature": 10**400}, "temperature 10"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    model: Model, prompt: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        model.stream(prompt, **options)
    assert caught.value.exit_code == 3


def test_without_a_tokenizer_ids_still_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    want = model.generate([5], max_new_tokens=5)
    monkeypatch.setattr(model, "codec", None)
    calls: list[tuple[int, str]] = []
    assert model.generate([5], max_new_tokens=5, on_token=lambda *call: calls.append(call)) == want
    assert {piece for _, piece in calls} == {""}
    for refused in (lambda: model.generate("a"), lambda: model.generate([5], stop="x"), lambda: model.decode([1])):
        with pytest.raises(RequestError, match="no tokenizer"):
            refused()
