"""Files of saved prompts: damaged, hostile and foreign ones are refused, and a save is whole or not at all."""

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
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from quant.checkpoint import save_quantized
from runtime.errors import RequestError
from runtime.model import Model
from tests.helpers.kills import STEPS
from tests.helpers.models import saved_model
from tests.helpers.sequences import IDS, PIECES, TREES, VOCAB, assert_equal, fed

HEAD = struct.Struct("<16sQ")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    root, loaded = tmp_path_factory.mktemp("files"), {}
    for tree in ("dual", "quad"):
        saved_model(root / tree, **TREES[tree])
        export_onnx(root / tree, root / f"{tree} onnx", verify=False)
        loaded[tree] = runtime.load(root / f"{tree} onnx", threads=1)
    yield loaded
    for model in loaded.values():
        model.close()


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
        with pytest.raises(RequestError, match=message) as refused:
            runtime.load_prompt(models["dual"], tmp_path / name)
        assert str(refused.value).count("give a file") == 1


# --- writing files ----------------------------------------------------------------------------------


def test_only_saved_prompts_are_replaced(models: dict[str, Model], tmp_path: Path) -> None:
    sequence = fed(models["dual"], IDS[:9])
    (tmp_path / "text").write_text("The tide mill")
    for name, message in {"text": "is not a saved prompt: it would be replaced", "": "is not a regular file"}.items():
        with pytest.raises(RequestError, match=message):
            sequence.save(tmp_path / name)
    (tmp_path / "astray").symlink_to("nowhere/saved")
    for place, message in {"nowhere/saved": "nowhere is not a folder", "astray": "nowhere is not a folder",
                           "n" * 255: "too long: give one of at most 241", "n" * 300: "too long", "a\0b": "null",
                           }.items():  # fmt: skip
        with pytest.raises(RequestError, match=message):
            sequence.save(tmp_path / place)
    (tmp_path / "astray").unlink()
    with pytest.raises(RequestError, match="no tokens to save"):
        models["dual"].sequence().save(tmp_path / "new")
    assert (tmp_path / "text").read_text() == "The tide mill"
    assert os.listdir(tmp_path) == ["text"]
    sequence.save(tmp_path / "saved")
    (tmp_path / "link").symlink_to("saved")
    fed(models["dual"], IDS[:12]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert runtime.load_prompt(models["dual"], tmp_path / "saved").length == 12
    sequence.save(tmp_path / ("n" * 241))


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
