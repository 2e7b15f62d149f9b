"""Compare batches of prompts, sliding contexts and speculation with the plain loop for one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import save_quantized
from quant.rules import parse_rule
from runtime import generate as generate_module
from runtime.errors import RequestError
from runtime.generate import Generation, Generations
from runtime.lookup import LONGEST, SHORTEST, Lookup
from runtime.model import Model
from runtime.sampling import Sampler, Sampling
from runtime.sequence import Sequence
from tests.helpers.exports import endless_models
from tests.helpers.models import saved_model

CONTEXT, VOCAB = 64, 97
TREES: dict[str, dict[str, Any]] = {
    "none": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4},
    "quad": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    with endless_models(tmp_path_factory.mktemp("together"), TREES) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def text_model(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model with a tokenizer."""
    out = tmp_path_factory.mktemp("text") / "onnx"
    export_onnx(tiny_dmpt, out, verify=False)
    with runtime.load(out, threads=1) as model:
        yield model


def made(generation: Generation | Generations) -> Generation | Generations:
    list(generation)
    return generation


# --- several prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_list_of_prompts_gives_what_each_gives_alone(
    tree: str, models: dict[str, Model], data: st.DataObject
) -> None:
    prompts = data.draw(st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=40), min_size=1, max_size=6))
    options = data.draw(
        st.sampled_from([{}, {"repetition_penalty": 1.3}, {"seed": 5}, {"top_k": 9, "temperature": 0.8, "seed": 7}])
    )
    options = {**options, "on_full": data.draw(st.sampled_from(["stop", "slide"])), "max_new_tokens": 40}
    several = models[tree].stream(prompts, **options)
    assert isinstance(several, Generations)
    tokens = list(several)
    for row, prompt in enumerate(prompts):
        seed = {"seed": options["seed"] + row} if "seed" in options else {}
        alone = models[tree].stream(prompt, **{**options, **seed})
        assert isinstance(alone, Generation)
        want = list(alone)
        assert [(t.id, t.text, t.path) for t in tokens if t.row == row] == [(t.id, t.text, t.path) for t in want]
        assert (several.texts[row].ids, several.texts[row].stop_reason) == (alone.ids, alone.stop_reason)


def test_prompts_that_wait_follow_as_others_end(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are reused, and never exceed the limit."""
    monkeypatch.setattr(generate_module, "TOGETHER", 3)
    monkeypatch.setattr(models["quad"], "end_of_text", 12)
    sizes: list[int] = []
    batch = models["quad"].batch
    monkeypatch.setattr(models["quad"], "batch", lambda *args: sizes.append(args[0]) or batch(*args))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, VOCAB, size).tolist() for size in rng.integers(1, 60, 10)]
    got = models["quad"].generate(prompts, max_new_tokens=30, seed=3)
    want = [models["quad"].generate(prompt, max_new_tokens=30, seed=3 + row) for row, prompt in enumerate(prompts)]
    assert got == want
    assert sizes == [3]
    assert len({len(ids) for ids in want}) > 3  # they end at different times


def test_texts_and_stop_strings_in_a_list(text_model: Model) -> None:
    prompts = ["The tide mill", "é", "stones and"]
    alone = [text_model.generate(prompt, max_new_tokens=30, seed=4 + row) for row, prompt in enumerate(prompts)]
    assert text_model.generate(prompts, max_new_tokens=30, seed=4) == alone
    stop = str(alone[1])[4:7]
    got = text_model.generate(prompts, max_new_tokens=30, seed=4, stop=stop)
    assert got == [str(text).partition(stop)[0] for text in alone]
    ids = text_model.encode(prompts[0])
    mixed = text_model.generate([ids, prompts[1]], max_new_tokens=30, seed=4)
    assert isinstance(mixed[0], list)
    assert mixed[1] == alone[1]
    assert text_model.decode(mixed[0]) == alone[0]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1], []], {}, "prompt 2 of 2: there are no tokens"),
        ([[1], [VOCAB]], {}, "prompt 2 of 2: unknown token id"),
        ([[1] * 65], {}, "prompt 1 of 1: 65 tokens do not fit"),
        ([[1], [2]], {"on_token": print}, "on_token is for one prompt"),
        ([[1], [2]], {"speculate": 3}, "one prompt at a time"),
        ([1], {"on_full": "wrap"}, "on_full 'wrap' must be 'stop' or 'slide'"),
        ([1], {"speculate": -1}, "speculate -1 must be"),
        ([1], {"speculate": 65}, "speculate 65 must be"),
        ([1], {"speculate": True}, "speculate True must be"),
    ],
)
def test_bad_requests(prompt: Any, options: dict[str, Any], message: str, models: dict[str, Model]) -> None:
    with pytest.raises(RequestError, match=message):
        models["dual"].generate(prompt, **options)


def test_several_texts_are_made_once(models: dict[str, Model]) -> None:
    several = made(models["dual"].stream([[1], [2]], max_new_tokens=2))
    with pytest.raises(RequestError, match="already generated"):
        next(iter(several))


def test_one_model_serves_several_threads(models: dict[str, Model]) -> None:
    def work(seed: int) -> Any:
        return models["quad"].generate([3, seed], 30, seed=seed), models["quad"].log_probs([seed, 4, 5]).tobytes()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(1, 9)))
    assert together == [work(seed) for seed in range(1, 9)]


# --- the context's end ------------------------------------------------------------------------------


def slow_slide(model: Model, prompt: list[int], count: int, **options: Any) -> list[int]:
    """Without a cache: when the context is full, keep its last half and score that for the next token."""
    sampler, seen, new = Sampler(Sampling(**options), prompt), list(prompt), []
    while len(new) < count:
        if len(seen) > model.context:
            seen = seen[-(model.context // 2) :]
        new.append(sampler(model.log_probs(seen)[-1]))
        seen.append(new[-1])
    return new


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("length", [1, 31, 63, 64])
def test_sliding_goes_on_as_a_fresh_run_on_the_last_half(tree: str, length: int, models: dict[str, Model]) -> None:
    prompt = np.random.default_rng(length).integers(1, VOCAB, length).tolist()
    generation = made(models[tree].stream(prompt, max_new_tokens=150, on_full="slide", seed=length))
    assert isinstance(generation, Generation)
    assert generation.ids == slow_slide(models[tree], prompt, 150, seed=length)
    assert generation.stop_reason == "max_new_tokens"


# --- guessing ahead ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6), st.integers(0, 8))
def test_a_guess_is_what_followed_the_longest_end_last_time(ids: list[int], most: int, room: int) -> None:
    want: list[int] = []
    for length in range(LONGEST, SHORTEST - 1, -1):
        ends = [i for i in range(length, len(ids)) if ids[i - length : i] == ids[-length:]]
        if length <= len(ids) and ends:
            want = ids[ends[-1] : ends[-1] + min(most, room)]
            break
    assert Lookup(ids, most).guess(room) == want


def test_guesses_shrink_where_they_are_wrong_and_grow_where_they_are_right() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], 8)
    sizes = []
    for guessed, right in [(8, 0), (4, 0), (2, 0), (1, 0), (0, 0), (1, 1), (2, 1), (2, 2), (4, 4), (8, 8)]:
        lookup.learn(guessed, right)
        sizes.append(len(lookup.guess(20)))
    assert sizes == [4, 2, 1, 1, 1, 2, 2, 4, 8, 8]


@pytest.mark.parametrize("tree", TREES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_guessing_does_not_change_the_text(tree: str, models: dict[str, Model], data: st.DataObject) -> None:
    """Repetitive prompts, so that there are many guesses; random models often disagree with them."""
    unit = data.draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6))
    prompt = (unit * 20)[: data.draw(st.integers(1, 60))]
    options = {
        "max_new_tokens": data.draw(st.integers(1, 90)),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.2])),
        "on_full": data.draw(st.sampled_from(["stop", "slide"])),
        **data.draw(st.sampled_from([{}, {"seed": 5}, {"seed": 6, "temperature": 0.3, "top_k": 4}])),
    }
    model, n = models[tree], data.draw(st.integers(1, 8))
    plain, fast = model.stream(prompt, **options), model.stream(prompt, **options, speculate=n)
    assert isinstance(plain, Generation)
    assert isinstance(fast, Generation)
    assert [(t.id, t.path) for t in plain] == [(t.id, t.path) for t in fast]
    assert plain.stop_reason == fast.stop_reason


@pytest.mark.parametrize("tree", TREES)
def test_guesses_are_used(tree: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy random model starts to repeat itself: then a run gives several tokens; other guesses are wrong."""
    sizes: list[int] = []
    run = Sequence.run

    def counted(self: Sequence, ids: Any, *more: Any, **how: Any) -> Any:
        sizes.append(len(ids))
        return run(self, ids, *more, **how)

    monkeypatch.setattr(Sequence, "run", counted)
    runs, wrong = 0, 0
    for first in range(1, 30):
        ids = models[tree].generate([first], max_new_tokens=60, speculate=4)
        runs, wrong = runs + len(sizes), wrong + sum(sizes) - len(ids)
        sizes.clear()
    assert runs < 29 * 60 - 20
    assert wrong > 20


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_where_activations_are_rounded_only_ties_may_go_another_way(scheme: str, tmp_path: Path) -> None:
    """The first differing token, if any, was as likely as the expected one to within rounding."""
    saved_model(tmp_path / "source", **TREES["none"])
    save_quantized(tmp_path / "source", tmp_path / "quantized", scheme=scheme)
    export_onnx(tmp_path / "quantized", tmp_path / "onnx", verify=False)
    with runtime.load(tmp_path / "onnx", threads=1) as model:
        model.ends = frozenset()
        same = 0
        for first in range(1, 25):
            plain, fast = model.generate([first], 50), model.generate([first], 50, speculate=4)
            assert isinstance(plain, list)
            assert isinstance(fast, list)
            at = next((i for i, (a, b) in enumerate(zip(plain, fast, strict=True)) if a != b), None)
            same += at is None
            if at is not None:
                says = model.log_probs([first, *plain[:at]])[-1]
                assert abs(says[plain[at]] - says[fast[at]]) < 0.2
        assert same >= 18


ROUNDS_TOGETHER = pytest.mark.parametrize(
    ("scheme", "rules"),
    [("int8-dynamic", []), ("int4", ["*.h.0.mlp.c_fc=int8-dynamic"]), ("int8-dynamic", ["*.h.*.mlp.*=int8"])],
)


@ROUNDS_TOGETHER
def test_schemes_that_round_rows_together_refuse_to_guess(scheme: str, rules: list[str], tmp_path: Path) -> None:
    """Even if few tensors are stored that way."""
    saved_model(tmp_path / "source", **TREES["dual"])
    save_quantized(tmp_path / "source", tmp_path / "quantized", scheme=scheme, rules=[parse_rule(r) for r in rules])
    export_onnx(tmp_path / "quantized", tmp_path / "onnx", verify=False)
    with runtime.load(tmp_path / "onnx", threads=1) as model, pytest.raises(RequestError, match="int8-dynamic"):
        model.stream([1], speculate=4)


@ROUNDS_TOGETHER
def test_texts_never_change_each_other_where_rows_are_rounded_together(
    scheme: str, rules: list[str], tmp_path: Path
) -> None:
    """Every prompt of a list gets exactly the text that it gets alone; a batch that could not promise it is refused."""
    saved_model(tmp_path / "source", **TREES["dual"])
    save_quantized(tmp_path / "source", tmp_path / "quantized", scheme=scheme, rules=[parse_rule(r) for r in rules])
    export_onnx(tmp_path / "quantized", tmp_path / "onnx", verify=False)
    prompts = [[1], list(range(2, 40)), [5, 6, 7]]
    with runtime.load(tmp_path / "onnx", threads=1) as model:
        together = list(model.stream(prompts, max_new_tokens=12, temperature=0.9, seed=3))
        for row, prompt in enumerate(prompts):
            alone = list(model.stream(prompt, max_new_tokens=12, temperature=0.9, seed=3 + row))
            assert [t.id for t in together if t.row == row] == [t.id for t in alone]
        with pytest.raises(RequestError, match="change each other with int8-dynamic"):
            model.batch(2)
        assert len(model.batch(1)) == 1
