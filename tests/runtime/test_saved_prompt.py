"""Prompts that are read once: a loaded text goes on like the saved one, bit by bit."""

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
from dmpt_export.onnx.exportable import ExportOptions
from runtime.errors import RequestError
from runtime.generate import Generation
from runtime.model import Model
from runtime.sampling import Sampler, Sampling
from runtime.sequence import Sequence
from tests.helpers.models import saved_model
from tests.helpers.sequences import CONTEXT, IDS, PIECES, TREES, VOCAB, assert_equal, fed

KINDS = [*TREES, *(f"{tree}, int8 caches" for tree in TREES)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """Random models without an end-of-text token, so that texts have the requested length."""
    root, loaded = tmp_path_factory.mktemp("saved"), {}
    for tree, fields in TREES.items():
        saved_model(root / tree, **fields)
    for kind in KINDS:
        tree, _, int8 = kind.partition(", ")
        export_onnx(
            root / tree, root / f"{kind} onnx", ExportOptions(kv_cache="int8" if int8 else "float"), verify=False
        )
        loaded[kind] = runtime.load(root / f"{kind} onnx", threads=1)
        loaded[kind].ends = frozenset()
    yield loaded
    for model in loaded.values():
        model.close()


def there_and_back(sequence: Sequence, model: Model, folder: Path) -> Sequence:
    sequence.save(folder / "saved")
    return runtime.load_prompt(model, folder / "saved")


# --- the same text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_loaded_text_goes_on_like_the_one_that_was_saved(
    kind: str, models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, CONTEXT - 1), max_size=8)))
    pieces = [IDS[a:b] for a, b in zip([0, *cuts], [*cuts, CONTEXT], strict=True)]
    before = data.draw(st.integers(1, len(pieces)))
    original = fed(models[kind], *pieces[:before])
    if data.draw(st.booleans()):
        original.rewind(data.draw(st.integers(1, original.length)))
        pieces[before:] = [IDS[original.length :][:9]] if original.length < CONTEXT else []
    loaded = there_and_back(original, models[kind], tmp_path_factory.mktemp("there"))
    assert loaded.tokens.tolist() == IDS[: original.length]
    assert_equal(loaded, original, pieces[before:])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "none" not in kind])
def test_nodes_still_lag_behind_and_then_catch_up(kind: str, models: dict[str, Model], tmp_path: Path) -> None:
    model = models[kind]
    original = fed(model, *PIECES)
    assert min(original.done.values()) < original.length
    loaded = there_and_back(original, model, tmp_path)
    assert loaded.done == original.done
    log_probs = [np.empty((1, VOCAB), np.float32) for _ in range(2)]
    for sequence, room in zip((original, loaded), log_probs, strict=True):
        sequence.run(IDS[30:31], room, every_node=True)
        assert set(sequence.done.values()) == {31}
    np.testing.assert_array_equal(*log_probs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_length_is_refused(kind: str, models: dict[str, Model]) -> None:
    sequence = fed(models[kind], *PIECES)
    before = sequence.length
    with pytest.raises(RequestError, match="length -1 must be"):
        sequence.rewind(-1)
    assert sequence.length == before


@pytest.mark.parametrize("kind", KINDS)
def test_rewinding_a_loaded_text(kind: str, models: dict[str, Model], tmp_path: Path) -> None:
    original = fed(models[kind], *PIECES)
    loaded = there_and_back(original, models[kind], tmp_path)
    for length in (25, 17, 3, 0):
        for sequence in (original, loaded):
            sequence.rewind(length)
        assert_equal(loaded, original, [IDS[40:45], IDS[45:46]])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_texts_make_equal_files(kind: str, models: dict[str, Model], tmp_path: Path) -> None:
    """Also what was loaded, and a text in memory that earlier tokens have filled."""
    first = fed(models[kind], *PIECES)
    used = fed(models[kind], IDS[::-1])
    used.reset()
    for piece in PIECES:
        used.feed(piece)
    first.save(tmp_path / "first")
    files = [(tmp_path / "first").read_bytes()]
    for name, sequence in {
        "used": used,
        "copy": first.copy(),
        "first": runtime.load_prompt(models[kind], tmp_path / "first"),
    }.items():
        sequence.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert len(set(files)) == 1


def test_a_copy_has_memory_of_its_own(models: dict[str, Model]) -> None:
    original = fed(models["quad"], *PIECES)
    copy, again = original.copy(), fed(models["quad"], *PIECES)
    copy.feed(IDS[::-1][:20])
    assert_equal(original, again, [IDS[30:35]])


# --- generating after it ----------------------------------------------------------------------------


def slow(model: Model, pieces: list[list[int]], count: int, **options: Any) -> list[int]:
    """Feed the pieces and then token by token; the last half of a full context begins a new text."""
    sequence, seen, new = model.sequence(), [token for piece in pieces for token in piece], []
    sampler = Sampler(Sampling(**options), seen)
    for piece in pieces:
        log_probs, _ = sequence.feed(piece)
    while True:
        new.append(sampler(log_probs[-1]))
        seen.append(new[-1])
        if len(new) == count:
            return new
        piece = new[-1:]
        if sequence.length == model.context:
            sequence.reset()
            piece = seen[-(model.context // 2) :]
        log_probs, _ = sequence.feed(piece)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [IDS[30:31], IDS[30:42], IDS[30:]])
@pytest.mark.parametrize(
    "options", [{}, {"seed": 5}, {"repetition_penalty": 1.5}, {"temperature": 0.7, "top_k": 9, "seed": 6}]
)
def test_generating_after_it_equals_feeding_the_same_pieces(
    kind: str, more: list[int], options: dict[str, Any], models: dict[str, Model], tmp_path: Path
) -> None:
    """The repetition penalty and a sliding context see the saved tokens, too."""
    model = models[kind]
    saved = there_and_back(fed(model, *PIECES), model, tmp_path)
    want = slow(model, [*PIECES, more], 50, **options)
    for _ in range(2):  # it stays as it was
        assert model.generate(more, 50, after=saved, on_full="slide", **options) == want
    assert_equal(saved, fed(model, *PIECES), [more])


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("prompt", [IDS[30:36], []])
def test_every_way_to_generate_takes_it(tree: str, prompt: list[int], models: dict[str, Model]) -> None:
    """Float caches: the whole text in one piece says the same up to rounding."""
    model, options = models[tree], {"max_new_tokens": 30, "logprobs": 2}
    saved = fed(model, *PIECES)
    whole = model.generate(IDS[:30] + prompt, **options)
    for more in ({}, {"speculate": 4}):
        made = model.generate(prompt, after=saved, **options, **more)
        assert [(token.id, token.path) for token in made] == [(token.id, token.path) for token in whole]
        assert [t.logprob for t in made] == pytest.approx([t.logprob for t in whole], abs=1e-4)
    (listed,) = model.generate([prompt], after=saved, **options)
    assert [(token.id, token.path) for token in listed] == [(token.id, token.path) for token in whole]
    assert_equal(saved, fed(model, *PIECES), [IDS[30:33]])


@pytest.mark.parametrize("tree", TREES)
def test_prompts_of_a_list_give_what_each_gives_alone(
    tree: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.generate.TOGETHER", 2)  # the others wait for a row
    model, saved = models[tree], fed(models[tree], *PIECES)
    prompts = [IDS[30:31], [], IDS[30:64], IDS[40:50], IDS[3:9]]
    got = model.generate(prompts, 25, after=saved, on_full="slide", seed=3)
    want = [model.generate(p, 25, after=saved, on_full="slide", seed=3 + row) for row, p in enumerate(prompts)]
    assert got == want


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_context_has_one_more_token(kind: str, models: dict[str, Model], tmp_path: Path) -> None:
    model = models[kind]
    saved = there_and_back(fed(model, IDS), model, tmp_path)
    for prompt in ([], np.zeros(0, int)):
        made = model.stream(prompt, 9, after=saved)
        assert isinstance(made, Generation)
        assert [token.id for token in made] == slow(model, [IDS[:63], IDS[63:]], 1)
        assert made.stop_reason == "context_full"
    with pytest.raises(RequestError, match="1 tokens after 64 that are already there do not fit"):
        model.generate([1], after=saved)


def test_threads_may_share_it(models: dict[str, Model]) -> None:
    saved = fed(models["quad"], *PIECES)

    def work(seed: int) -> Any:
        return models["quad"].generate([seed], 20, after=saved, seed=seed)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(1, 9)))
    assert together == [work(seed) for seed in range(1, 9)]


@pytest.mark.parametrize(
    ("side", "want"), [("left", IDS[53:63]), ("right", IDS[:10]), ("middle", [*IDS[:5], *IDS[58:63]])]
)
def test_only_the_new_prompt_is_cut(side: str, want: list[int], models: dict[str, Model]) -> None:
    """30 saved tokens and 24 to write leave 10 of 64."""
    saved = fed(models["dual"], *PIECES)
    made = models["dual"].stream(IDS[:63], 24, after=saved, truncate=side)
    assert isinstance(made, Generation)
    assert made.prompt.tolist() == IDS[:30] + want
    with pytest.raises(RequestError, match="would get 32 tokens, and the text that it continues has 60"):
        models["dual"].stream(IDS, 60, after=fed(models["dual"], IDS[:60]), truncate=side)


def test_what_cannot_be_continued(models: dict[str, Model]) -> None:
    model, saved = models["dual"], fed(models["dual"], IDS[:20])
    for wrong in (fed(models["quad"], IDS[:20]), "saved", [1, 2]):
        with pytest.raises(RequestError, match="must be a sequence of this model"):
            model.stream([1], after=wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="has no tokens"):
        model.stream([1], after=model.sequence())
    for prompt in ([1], [[1], [2]]):
        made = model.stream(prompt, 3, after=saved)
        saved.rewind(5)
        saved.feed(IDS[40:60])
        with pytest.raises(RequestError, match="has changed since"):
            next(iter(made))
        saved = fed(model, IDS[:20])
