"""Prompts that are read once: a loaded text goes on like the saved one, bit by bit; damaged files are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from quant.checkpoint import save_quantized
from runtime.errors import RequestError
from runtime.generate import Generation
from runtime.model import Model
from runtime.sampling import Sampler, Sampling
from runtime.sequence import Sequence
from tests.helpers.kills import STEPS
from tests.helpers.models import saved_model

CONTEXT, VOCAB = 64, 97
TREES: dict[str, dict[str, Any]] = {
    "none": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4},
    "quad": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1},
}
KINDS = [*TREES, *(f"{tree}, int8 caches" for tree in TREES)]
IDS = np.random.default_rng(3).integers(1, VOCAB, CONTEXT).tolist()
PIECES = (IDS[:17], IDS[17:18], IDS[18:30])  # with splits, some nodes lag behind afterwards


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


def fed(model: Model, *pieces: list[int]) -> Sequence:
    sequence = model.sequence()
    for piece in pieces:
        sequence.feed(piece)
    return sequence


def there_and_back(sequence: Sequence, model: Model, folder: Path) -> Sequence:
    sequence.save(folder / "saved")
    return runtime.load_prompt(model, folder / "saved")


def assert_equal(a: Sequence, b: Sequence, pieces: list[list[int]]) -> None:
    """Both say the same after every further piece, bit by bit, and the same nodes lag behind."""
    for piece in [[], *pieces]:
        if piece:
            for got, want in zip(a.feed(piece, last=len(piece)), b.feed(piece, last=len(piece)), strict=True):
                np.testing.assert_array_equal(got, want)
        assert a.done == b.done
        np.testing.assert_array_equal(a.tokens, b.tokens)


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


# --- files ------------------------------------------------------------------------------------------

HEAD = struct.Struct("<16sQ")


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and arrays of a file."""
    size = HEAD.unpack_from(data)[1]
    return json.loads(data[HEAD.size : HEAD.size + size]), data[HEAD.size + size : -32]


def closed(header: Any, arrays: bytes) -> bytes:
    """A file with a right sha256."""
    text = json.dumps(header, sort_keys=True).encode()
    data = HEAD.pack(b"dmpt-prompt-file", len(text)) + text + arrays
    return data + hashlib.sha256(data).digest()


@pytest.fixture(scope="module")
def file(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "saved"
    fed(models["quad"], *PIECES).save(path)
    return path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused(
    models: dict[str, Model], file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut, longer, or with other bytes, most often in the header: one clear error and nothing else."""
    at = st.one_of(st.integers(0, 700), st.integers(0, len(file) - 1))
    damaged = bytearray(file)
    for place, value in data.draw(st.lists(st.tuples(at, st.integers(0, 255)), max_size=4)):
        damaged[place] = value
    end = data.draw(st.one_of(st.just(len(file)), at))
    damaged = damaged[:end] + data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    if damaged == file:
        assert_equal(runtime.load_prompt(models["quad"], path), fed(models["quad"], *PIECES), [])
        return
    with pytest.raises(RequestError) as caught:
        runtime.load_prompt(models["quad"], path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def done(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["done"].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(tokens=29), "29 tokens, 30 of them in the caches"),
        (lambda h: h.update(tokens=65, done=dict.fromkeys(h["done"], 65)), "65 tokens, 65 of them in the caches, in a"),
        (lambda h: h.update(tokens=0), "tokens: 0 is not a whole number above 0"),
        (lambda h: h.update(tokens=True), "tokens: True is not"),
        (lambda h: h.update(tokens=10**300), "tokens: 1000"),
        (lambda h: h.pop("model"), "model: missing"),
        (done("left", 31), "left is ahead of its parent"),
        (done("left", -1), "done.left: -1 is not"),
        (done("middle", 3), "its nodes are not those of the model"),
        (lambda h: h["done"].pop("left"), "its nodes are not those of the model"),
        (lambda h: h.update(tokens=64, done=dict.fromkeys(h["done"], 64)), "bytes, expected"),
        (lambda h: h.update(format_version=2), "has format 2, this program reads format 1: update the program"),
        (lambda h: h.update(format_version=0), "format_version: 0 is not"),
        (lambda h: h["model"].update(files="0" * 64), "was saved with a different export of 'quad' "),
        (lambda h: h["model"].update(source="1" * 64), "was saved with a different model of the same name as 'quad' "),
        (lambda h: h["model"].update(name="\x1b[2Jx", scheme="int4"), r"with '\\x1b\[2Jx' \(weights 'int4', caches"),
        (lambda h: h.update(padding="x" * (1 << 20)), "a header of"),
    ],
)
def test_what_a_header_may_not_say(
    change: Callable[[dict[str, Any]], Any], message: str, models: dict[str, Model], file: bytes, tmp_path: Path
) -> None:
    """Although the sha256 is right."""
    header, arrays = opened(file)
    assert closed(header, arrays) == file
    change(header)
    (tmp_path / "saved").write_bytes(closed(header, arrays))
    with pytest.raises(RequestError, match=message) as caught:
        runtime.load_prompt(models["quad"], tmp_path / "saved")
    assert str(tmp_path / "saved") in str(caught.value)


@pytest.mark.parametrize("header", [[], 7, None, {}, {"format_version": "1"}])
def test_a_header_of_another_form(header: Any, models: dict[str, Model], file: bytes, tmp_path: Path) -> None:
    (tmp_path / "saved").write_bytes(closed(header, opened(file)[1]))
    with pytest.raises(RequestError, match="is damaged"):
        runtime.load_prompt(models["quad"], tmp_path / "saved")


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a": "\xff"}', b"1" * 10_000, b""])
def test_a_header_that_is_not_json(text: bytes, models: dict[str, Model], tmp_path: Path) -> None:
    data = HEAD.pack(b"dmpt-prompt-file", len(text)) + text
    (tmp_path / "saved").write_bytes(data + hashlib.sha256(data).digest())
    with pytest.raises(RequestError, match="is damaged"):
        runtime.load_prompt(models["quad"], tmp_path / "saved")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, struct.pack("<q", VOCAB), "an id outside the vocabulary, 0 to 96"),
        (8, struct.pack("<q", -1), "an id outside the vocabulary"),
        (30 * 8, struct.pack("<f", float("nan")), "a number that is not finite"),
        (-4, struct.pack("<f", float("inf")), "a number that is not finite"),
    ],
)
def test_numbers_that_no_text_has(
    place: int, value: bytes, message: str, models: dict[str, Model], file: bytes, tmp_path: Path
) -> None:
    header, arrays = opened(file)
    place %= len(arrays)
    (tmp_path / "saved").write_bytes(closed(header, arrays[:place] + value + arrays[place + len(value) :]))
    with pytest.raises(RequestError, match=message):
        runtime.load_prompt(models["quad"], tmp_path / "saved")


def test_a_huge_file_is_refused_without_reading_it(models: dict[str, Model], file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(file)
    os.truncate(path, 1 << 33)  # sparse
    with pytest.raises(RequestError, match=f"it has {1 << 33} bytes, expected {len(file)}"):
        runtime.load_prompt(models["quad"], path)


def test_other_models_and_exports_are_refused_by_name(tmp_path: Path) -> None:
    """Another checkpoint, another scheme, other caches; the same export elsewhere, with another README, is the same."""
    saved_model(tmp_path / "one", **TREES["dual"])
    saved_model(tmp_path / "two", **TREES["dual"], seed=1)
    for scheme in ("int8", "int4"):
        save_quantized(tmp_path / "one", tmp_path / scheme, scheme=scheme)
    exports = {
        "one": ("one", "float"),
        "two": ("two", "float"),
        "8": ("int8", "float"),
        "4": ("int4", "float"),
        "kv": ("int8", "int8"),
    }
    for name, (source, cache) in exports.items():
        export_onnx(tmp_path / source, tmp_path / f"onnx {name}", ExportOptions(kv_cache=cache), verify=False)
    described = {
        "one": "'one' (weights 'float', caches 'float32', activations 'float32')",
        "two": "'two' (weights 'float', caches 'float32', activations 'float32')",
        "8": "'int8' (weights 'int8', caches 'float32', activations 'float32')",
        "4": "'int4' (weights 'int4', caches 'float32', activations 'float32')",
        "kv": "'int8' (weights 'int8', caches 'int8', activations 'float32')",
    }
    shutil.copytree(tmp_path / "onnx 8", tmp_path / "moved")
    models = {name: runtime.load(tmp_path / f"onnx {name}", threads=1) for name in exports}
    for name, model in models.items():
        fed(model, IDS[:9]).save(tmp_path / f"saved {name}")
    for saved in exports:
        for name, model in models.items():
            if name == saved:
                assert_equal(runtime.load_prompt(model, tmp_path / f"saved {saved}"), fed(model, IDS[:9]), [])
                continue
            with pytest.raises(RequestError) as caught:
                runtime.load_prompt(model, tmp_path / f"saved {saved}")
            wrong = f"was saved with {described[saved]}, and this model is {described[name]}: save the prompt again"
            assert wrong in str(caught.value)
    with runtime.load(tmp_path / "moved", threads=1) as moved:
        assert runtime.load_prompt(moved, tmp_path / "saved 8").length == 9
    for model in models.values():
        model.close()


def test_what_is_not_a_saved_prompt(models: dict[str, Model], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The tide mill")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    places = {"text": "is not a saved prompt", "empty": "is not a saved prompt", "pipe": "is not a regular file",
              "nowhere": "No such file", "": "is not a regular file", "a\0b": "null"}  # fmt: skip
    for name, message in places.items():
        with pytest.raises(RequestError, match=message):
            runtime.load_prompt(models["dual"], tmp_path / name)


# --- writing files ----------------------------------------------------------------------------------


def test_only_saved_prompts_are_replaced(models: dict[str, Model], tmp_path: Path) -> None:
    sequence = fed(models["dual"], IDS[:9])
    (tmp_path / "text").write_text("The tide mill")
    for name, message in {"text": "is not a saved prompt: it would be replaced", "": "is not a regular file"}.items():
        with pytest.raises(RequestError, match=message):
            sequence.save(tmp_path / name)
    with pytest.raises(RequestError, match="nowhere is not a folder"):
        sequence.save(tmp_path / "nowhere" / "saved")
    with pytest.raises(RequestError, match="no tokens to save"):
        models["dual"].sequence().save(tmp_path / "new")
    assert (tmp_path / "text").read_text() == "The tide mill"
    assert os.listdir(tmp_path) == ["text"]
    sequence.save(tmp_path / "saved")
    (tmp_path / "link").symlink_to("saved")
    fed(models["dual"], IDS[:12]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert runtime.load_prompt(models["dual"], tmp_path / "saved").length == 12


def test_a_failed_save_leaves_the_old_file(
    models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed(models["dual"], IDS[:9]).save(tmp_path / "saved")
    before = (tmp_path / "saved").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        sequence = fed(models["dual"], IDS[:12])
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space left"):
                sequence.save(tmp_path / "saved")
        assert os.listdir(tmp_path) == ["saved"]
        assert (tmp_path / "saved").read_bytes() == before


KILLED = (
    "import hashlib, os, shutil, signal, sys\nfrom pathlib import Path\n"
    "from runtime.replace import replacing\n"
    "last = int(sys.argv[2])\n" + STEPS + "os.replace, os.fsync = step(os.replace), step(os.fsync)\n"
    "with replacing(Path(sys.argv[1])) as file:\n"
    "    step(file.write)(b'new' * 100_000)\n"
)


def test_a_killed_save_leaves_the_old_file(tmp_path: Path) -> None:
    """Killed before and after each step; the next save removes what was left beside it."""
    seen = set()
    for last in range(30):
        out = tmp_path / str(last) / "saved"
        out.parent.mkdir()
        out.write_bytes(b"old")
        finished = subprocess.run([sys.executable, "-c", KILLED, str(out), str(last)], check=False)
        seen.add(out.read_bytes()[:3])
        assert out.read_bytes() in (b"old", b"new" * 100_000)
        if finished.returncode == 0:
            break
        assert finished.returncode == -signal.SIGKILL
        again = subprocess.run([sys.executable, "-c", KILLED, str(out), "1000"], check=False)
        assert again.returncode == 0
        assert out.read_bytes() == b"new" * 100_000
        assert os.listdir(out.parent) == ["saved"]
    else:
        pytest.fail("the writer never came to its end")
    assert seen == {b"old", b"new"}
