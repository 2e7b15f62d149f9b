"""Valid and damaged manifests and folders: errors name every fault at once and have exit code 3."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ModelError
from runtime.files import check_files
from runtime.manifest_file import MANIFEST_NAME, parse_manifest, read_manifest
from runtime.schema import unsafe_name

NODES = [
    {"name": "root", "start": 0, "stop": 1, "parent": None, "children": ["left", "right"], "prefix": "transformer"},
    {"name": "left", "start": 1, "stop": 2, "parent": "root", "children": None, "prefix": "paths.left"},
    {"name": "right", "start": 1, "stop": 2, "parent": "root", "children": None, "prefix": "paths.right"},
]
BLOCKS = ["transformer.h.0", "paths.left.h.1", "paths.right.h.1"]


def tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def caches(label: str) -> list[dict[str, Any]]:
    shape = ("batch", 2, "capacity", 4)
    return [tensor(f"{label}.{block}.{part}", "float32", *shape) for block in BLOCKS for part in ("key", "value")]


def entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def sound() -> dict[str, Any]:
    """A dual model of two blocks, as the exporter would describe it."""
    config = {"vocab_size": 11, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "head_dim": 4, "fast_k": 3}
    return {
        "format": "dmpt-onnx",
        "format_version": 2,
        "model": "model.onnx",
        "target": "cpu",
        "opset": 21,
        "activation_dtype": "float32",
        "cache_dtype": "float32",
        "config": config | {"head_topk": None, "bos_token_id": 0, "eos_token_id": 0, "splits": [1]},
        "tree": copy.deepcopy(NODES),
        "leaves": ["left", "right"],
        "head_allocation": {"left": [0, 1], "right": [2]},
        "inputs": [
            tensor("input_ids", "int64", "batch", "tokens"),
            tensor("position_ids", "int64", "batch", "tokens"),
            tensor("seqlens_k", "int32", "batch"),
            tensor("total_length", "int32"),
            tensor("last", "int64"),
            tensor("every_node", "bool"),
            tensor("pending.left", "float32", "batch", "p", 8),
            tensor("pending.right", "float32", "batch", "q", 8),
            *caches("past"),
        ],
        "outputs": [
            tensor("log_probs", "float32", "batch", "last", 11),
            tensor("routes", "int64", "batch", "last"),
            tensor("rows.root", "float32", "batch", "tokens", 8),
            *caches("present"),
        ],
        "quantization": {"scheme": "float", "tensors": {}},
        "parameters": {"total": 10, "touched_per_token": 5},
        "bytes_touched_per_token": 20,
        "files": {"model.onnx": entry(b"graph"), "model.onnx.data": entry(b"weights")},
        "source": {"name": "m", "fingerprint": "0"},
        "tools": {},
        "parity": None,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(sound()))
    return tmp_path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def damaged(*path: Any, value: Any = None, drop: bool = False) -> dict[str, Any]:
    raw: Any = sound()
    place = raw
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return raw


def test_a_sound_manifest_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert manifest.config.n_positions == 16
    assert manifest.config.splits == (1,)
    assert manifest.way("right") == ("root", "right")
    assert manifest.nodes["right"].parent == "root"
    assert manifest.nodes["left"].caches == ["paths.left.h.1.key", "paths.left.h.1.value"]
    assert manifest.inputs["pending.left"].shape == ("batch", "p", 8)
    assert manifest.head_allocation == {"left": (0, 1), "right": (2,)}
    assert manifest.raw == sound()
    assert manifest.schemes == set()


def test_how_tensors_are_stored_is_checked() -> None:
    tensors = {"a": {"scheme": "int8", "bits": 8}, "b": {"scheme": "int4"}}
    assert parse_manifest(damaged("quantization", "tensors", value=tensors)).schemes == {"int8", "int4"}
    for wrong in ([], {"a": 3}, {"a": {"scheme": 4}}, {"a": {}}):
        assert "quantization.tensors" in refusal(
            lambda wrong=wrong: parse_manifest(damaged("quantization", "tensors", value=wrong))
        )


def leaves_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every field that the runtime checks."""
    if isinstance(value, dict) and path[:1] not in {("tools",), ("source",)}:
        return [inner for key, item in value.items() for inner in leaves_of(item, (*path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [inner for i, item in enumerate(value) for inner in leaves_of(item, (*path, i))]
    return [path]


FIELDS = [path for path in leaves_of(sound()) if path != ("parity",)]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_checked(path: tuple[Any, ...]) -> None:
    """Each field missing, or of a type that is never valid."""
    assert len(FIELDS) > 90
    name = str(path[-1])
    assert name in refusal(lambda: parse_manifest(damaged(*path, drop=True)))
    assert name in refusal(lambda: parse_manifest(damaged(*path, value=-1.5)))


def test_all_faults_are_named_at_once() -> None:
    raw = sound()
    del raw["leaves"], raw["config"]["n_embd"], raw["inputs"][2]["dtype"]
    raw["opset"] = "21"
    message = refusal(lambda: parse_manifest(raw))
    for fault in (
        "leaves: missing",
        "config.n_embd: missing",
        "inputs[2].dtype: missing",
        "opset: '21' is not a whole",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (damaged("format", value="gguf"), "format 'gguf'"),
        (damaged("format_version", value=3), "format_version 3"),
        (damaged("target", value="tpu"), "'tpu' is not one of cpu, cuda"),
        (damaged("activation_dtype", value="bfloat16"), "bfloat16"),
        (damaged("cache_dtype", value="int8"), "past.transformer.h.0.key is float32, expected int8"),
        (damaged("cache_dtype", value="float16"), "'float16' is neither the activations' type nor int8"),
        (damaged("config", "vocab_size", value=True), "vocab_size: True"),
        (damaged("config", "vocab_size", value=1 << 40), "vocab_size"),
        (damaged("config", "n_layer", value=1 << 39), "n_layer: 549755813888 is above"),
        (damaged("config", "fast_k", value=12), "fast_k: 12 does not fit a vocabulary of 11"),
        (damaged("config", "eos_token_id", value=11), "eos_token_id: 11"),
        (damaged("config", "n_layer", value=3), "leaf 'left' ends at block 2 of 3"),
        (damaged("tree", value=[]), "must begin with the root"),
        (damaged("tree", 1, "start", value=0), "'left' holds blocks 0 to 2"),
        (damaged("tree", 1, "parent", value="up"), "'left' has no parent"),
        (damaged("tree", 1, "parent", value=None), "'left' has no parent"),
        (damaged("tree", 1, "name", value="right"), "name every node once"),
        (damaged("tree", 0, "name", value="trunk"), "must be 'root'"),
        (damaged("tree", 0, "children", value=["left", "middle"]), "'middle' is missing"),
        (damaged("tree", 2, "stop", value=1), "'right' holds blocks 1 to 1"),
        (damaged("leaves", value=["left"]), "leaves"),
        (damaged("head_allocation", "right", drop=True), "head_allocation"),
        (damaged("head_allocation", "right", value=[]), "head_allocation"),
        (damaged("inputs", 6, drop=True), "inputs: missing pending.left"),
        (damaged("inputs", 8, "name", value="past.x.key"), "inputs: unknown past.x.key"),
        (damaged("outputs", 0, "name", value="head_log_weights.x"), "outputs: unknown head_log_weights.x"),
        (damaged("outputs", 2, "dtype", value="float16"), "rows.root is float16, expected float32"),
        (damaged("config", "vocab_size", value=10**9), "log_probs is ['batch', 'last', 11]"),
        (damaged("config", "n_embd", value=10**9), "rows.root is ['batch', 'tokens', 8]"),
        (damaged("config", "head_dim", value=8), "config.head_dim: 8 times 2 heads is not n_embd 8"),
        (damaged("outputs", 0, "shape", value=["batch", "last"]), "log_probs is ['batch', 'last']"),
        (damaged("files", "model.onnx", drop=True), "does not list the model"),
        (damaged("files", "model.onnx", "sha256", value="A" * 64), "64 hexadecimal digits"),
        (damaged("files", "../model.onnx.data", value=entry(b"")), "'../model.onnx.data' is not a plain file name"),
        ([], "is not an object"),
        (None, "is not an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions_are_named(raw: Any, message: str) -> None:
    assert message in refusal(lambda: parse_manifest(raw))


@pytest.mark.parametrize(
    "name",
    [
        "../x", "a/../../x", "/etc/passwd", "a/b", "..", ".", "", "C:\\x", "C:x", "..\\x", "\\\\host\\x", "a\\b",
        "a\0b", "x\n",
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere(name: str) -> None:
    assert unsafe_name(name) is not None
    assert repr(name) in refusal(lambda: parse_manifest(damaged("files", name, value=entry(b""))))


@pytest.mark.parametrize("name", ["model.onnx", "a b.data", "..data", "modèle.onnx"])
def test_plain_names(name: str) -> None:
    assert unsafe_name(name) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[" * 200_000, "is not JSON")],
)  # fmt: skip
def test_no_json(text: bytes, message: str, folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(text)
    assert message in refusal(lambda: read_manifest(folder))


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(lambda: read_manifest(tmp_path / "nowhere"))
    assert f"has no {MANIFEST_NAME}" in refusal(lambda: read_manifest(tmp_path))


def check(folder: Path, verify: bool = True) -> str:
    manifest = read_manifest(folder)
    return refusal(lambda: check_files(folder, manifest, verify))


def test_missing_and_short_files_are_named_together(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.data").write_bytes(b"weight")
    message = check(folder)
    assert "model.onnx is missing" in message
    assert "model.onnx.data has 6 bytes, expected 7" in message


def test_one_changed_bit_is_found_unless_told_not_to_look(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"weightr")
    assert "model.onnx.data has a different sha256" in check(folder)
    check_files(folder, read_manifest(folder), verify=False)


def test_links_are_refused_also_with_the_right_content(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_bytes(b"weights")
    data = folder / "model.onnx.data"
    data.unlink()
    data.symlink_to(outside)
    assert "model.onnx.data is a symbolic or hard link" in check(folder, verify=False)
    data.unlink()
    os.link(outside, data)
    assert "model.onnx.data is a symbolic or hard link" in check(folder, verify=False)
    data.unlink()
    data.mkdir()
    assert "model.onnx.data is not a regular file" in check(folder)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_that_are_not_listed_are_refused(
    link: Callable[[Path, Path], None], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The graph names its data files itself, so it could name one of these."""
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_bytes(b"secret")
    (folder / "notes.txt").write_text("unlisted plain files are nobody's business")
    check_files(folder, read_manifest(folder))
    link(outside, folder / "more.data")
    assert "more.data is a symbolic or hard link" in check(folder, verify=False)
