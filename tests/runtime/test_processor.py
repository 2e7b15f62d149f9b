"""The ONNX Runtime version that an export needs, and exports that are refused because they would crash on Arm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import runtime
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from quant.checkpoint import save_quantized
from quant.rules import parse_rule
from runtime import processor, session
from runtime.errors import ModelError, SetupError
from runtime.manifest_file import MANIFEST_NAME, read_manifest
from tests.helpers.exports import TREES
from tests.helpers.models import saved_model

INT8_ROWS = [parse_rule("transformer.wte=int8"), parse_rule("heads.*=int8")]
HALF_ROWS = [parse_rule("transformer.wte=fp16"), parse_rule("heads.*=fp16")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("processor") / "source", **TREES["dual, fast-k"])


def device(source: Path, out: Path, scheme: str, rules: Any = (), **options: Any) -> Path:
    if scheme != "float":
        save_quantized(source, out / "quantized", scheme, rules=list(rules))
        source = out / "quantized"
    export_onnx(source, out / "device", ExportOptions(**options), verify=False)
    return out / "device"


def aged(folder: Path) -> Path:
    """Imitate an old export: without required versions, and with scales in the main graph."""
    path = folder / MANIFEST_NAME
    raw = json.loads(path.read_text())
    del raw["requires"], raw["branches_own_scales"]
    path.write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("scheme", "rules", "options", "least"),
    [  # each found by loading such an export with 1.19 to 1.32
        ("float", (), {}, "1.20"),
        ("float", (), {"opset": 22}, "1.21"),
        ("float", (), {"opset": 24}, "1.24"),
        ("float", (), {"kv_cache": "int8"}, "1.28"),
        ("fp16", (), {}, "1.20"),
        ("int4", HALF_ROWS, {}, "1.20"),
        ("int8", HALF_ROWS, {}, "1.22"),
        ("int4", (), {}, "1.23"),
        ("int8-dynamic", (), {}, "1.23"),
        ("int2", HALF_ROWS, {}, "1.24"),
        ("int2", INT8_ROWS, {}, "1.24"),
        ("int2", (), {}, "1.27"),
    ],
)
def test_the_least_version_is_written_down(
    source: Path, scheme: str, rules: Any, options: dict[str, Any], least: str, tmp_path: Path
) -> None:
    folder = device(source, tmp_path, scheme, rules, **options)
    assert read_manifest(folder).least_onnxruntime == least


@pytest.mark.parametrize(("version", "fits"), [("1.9.9", False), ("1.22.1", False), ("1.23.0", True), ("2.0", True)])
def test_an_older_onnxruntime_is_refused(
    source: Path, version: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = device(source, tmp_path, "int4")
    monkeypatch.setattr(session, "import_onnxruntime", with_version(version))
    if fits:
        runtime.load(folder).close()
        return
    with pytest.raises(SetupError, match=rf"needs onnxruntime 1\.23 or later, {version} is installed: pip install"):
        runtime.load(folder)


def with_version(version: str) -> Any:
    """An import_onnxruntime() that returns the real package with a different version."""
    real = session.import_onnxruntime("cpu")

    class Renamed:
        __version__ = version

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    return lambda _device: Renamed()


@pytest.mark.parametrize("tree", ["dual, fast-k", "dual, one head each", "gpt2"])
@pytest.mark.parametrize(
    ("scheme", "rules", "crashes"),
    [
        ("int4", (), True),
        ("int4", INT8_ROWS, True),  # blocks alone
        ("int8", [parse_rule("heads.*=int4"), parse_rule("transformer.wte=int4")], True),  # heads alone
        ("int8", [parse_rule("transformer.h.*=int4")], False),  # in the trunk: no branch
        ("int2", (), False),
        ("int8", (), False),
        ("float", (), False),
    ],
)
def test_what_would_crash_an_arm_processor_is_refused(
    tree: str, scheme: str, rules: Any, crashes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads only the manifest, because loading the graph would crash."""
    if tree == "gpt2":  # no branches, and its head is the embedding
        rules, crashes = [rule for rule in rules if not rule.pattern.startswith("heads")], False
    folder = device(saved_model(tmp_path / "source", **TREES[tree]), tmp_path, scheme, rules)
    assert not read_manifest(folder).has_outer_scales
    old = aged(Path(shutil.copytree(folder, tmp_path / "old")))
    assert read_manifest(old).has_outer_scales == crashes
    monkeypatch.setattr(processor, "has_dot_product", lambda: True)
    for path, version, refused in ((old, "1.28.0", crashes), (old, "1.29.0", False), (folder, "1.27.0", False)):
        monkeypatch.setattr(session, "import_onnxruntime", with_version(version))
        if refused:
            with pytest.raises(ModelError, match=r"crash onnxruntime 1\.28\.0 on this Arm .*: export the model again"):
                runtime.load(path)
        else:
            runtime.load(path).close()
    monkeypatch.setattr(processor, "has_dot_product", lambda: False)
    monkeypatch.setattr(session, "import_onnxruntime", with_version("1.24.0"))
    runtime.load(old).close()  # still loads where it did before


def test_heads_that_are_only_gathered_do_not_crash(source: Path, tmp_path: Path) -> None:
    """Under fast-k the heads besides the anchor, and factors of deltas, are looked up by row."""
    anchors = [parse_rule(f"heads.{j}=int8") for j in (0, 4)]
    save_quantized(source, tmp_path / "int4", "int8", rules=[*anchors, parse_rule("heads.*=int4")])
    save_quantized(source, tmp_path / "delta", "int8", rules=[*anchors, parse_rule("heads.*=delta-r16")])
    for name in ("int4", "delta"):
        for fast_k, crashes in ((16, False), (0, True)):
            out = tmp_path / f"{name}-{fast_k}"
            export_onnx(tmp_path / name, out, ExportOptions(fast_k=fast_k), verify=False)
            assert read_manifest(aged(out)).has_outer_scales == crashes


def test_batches_with_an_int8_cache_are_refused_where_they_would_be_wrong(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = aged(device(source, tmp_path, "int8", kv_cache="int8"))
    monkeypatch.setattr(session, "import_onnxruntime", with_version("1.27.0"))
    with runtime.load(folder) as model:
        assert model.score([1, 2, 3])[0].shape == (3, 97)
        with pytest.raises(SetupError, match=r"onnxruntime 1\.27\.0 decodes several texts incorrectly"):
            model.batch(2)
    monkeypatch.setattr(session, "import_onnxruntime", with_version("1.28.0"))
    with runtime.load(folder) as model:
        assert len(model.batch(2)) == 2


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "riscv64"])
def test_other_processors_are_never_asked(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor.ctypes, "CDLL", pytest.fail)
    assert not processor.has_dot_product()


@pytest.mark.parametrize(("bits", "found"), [(1 << 20, True), (0, False), ((1 << 32) - 1 - (1 << 20), False)])
def test_linux_says_which_instructions_there_are(bits: int, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def getauxval(which: int) -> int:
        return bits if which == 16 else 0

    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(processor.sys, "platform", "linux")
    monkeypatch.setattr(processor.ctypes, "CDLL", lambda _: type("Libc", (), {"getauxval": staticmethod(getauxval)}))
    assert processor.has_dot_product() is found


@pytest.mark.parametrize(
    ("tree", "crashes"),
    [("dual, fast-k", True), ("quad, fast-k", True), ("dual, all heads", False), ("multi-head", False),
     ("projected, one anchor", False), ("projected, one anchor, shared heads", True)],
)  # fmt: skip
def test_batches_that_would_search_an_empty_leaf_are_refused(
    tree: str, crashes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TopK on no rows ends the process with onnxruntime before 1.31; exports guard it now."""
    folder = device(saved_model(tmp_path / "source", **TREES[tree]), tmp_path, "float")
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    path = old / MANIFEST_NAME
    raw = json.loads(path.read_text())
    del raw["empty_leaves_guarded"]
    path.write_text(json.dumps(raw))
    for place, version, refused in ((old, "1.30.0", crashes), (old, "1.31.0", False), (folder, "1.30.0", False)):
        monkeypatch.setattr(session, "import_onnxruntime", with_version(version))
        with runtime.load(place) as model:
            if refused:
                with pytest.raises(ModelError, match=r"several texts at once crash onnxruntime 1\.30\.0"):
                    model.batch(2)
            else:
                assert len(model.batch(2)) == 2
