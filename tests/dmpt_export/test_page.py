"""`page`: everything that the page loads lies beside it, and what cannot become a page is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import runtime
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from dmpt_export.requests.page import VENDOR
from quant.checkpoint import save_quantized
from tests.helpers.cli import run
from tests.helpers.models import saved_model
from tests.helpers.paths import REPOSITORY


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """node_modules with files of the right names."""
    for package, files in VENDOR.items():
        for file in files:
            path = tmp_path / "node_modules" / package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{package} {file}")
    return tmp_path / "node_modules"


def test_all_that_the_page_loads_lies_beside_it(dual_device: Path, modules: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert run("page", dual_device, site, "--modules", modules) == 0
    loaded: set[str] = set()
    for file in (*site.glob("*.mjs"), site / "index.html"):
        text = file.read_text(encoding="utf-8")
        loaded |= set(re.findall(r"""(?:from|import\(|href=|src=)\s*['"](?:\./)?([\w./-]+)['"]""", text))
        assert "://" not in re.sub(r"http://localhost:8000|https\?:", "", text), f"{file.name} names another server"
    relative = {name for name in loaded if not name.startswith(("node:", "@", "onnxruntime", "dmpt-runtime"))}
    modules_of_npm = {path.name for path in (REPOSITORY / "runtime" / "web").glob("*.mjs")}
    assert modules_of_npm | {"page.mjs", "page.css", "vendor/ort.wasm.min.mjs"} <= relative
    assert not [name for name in relative if not (site / name).is_file()]
    with runtime.load(site / "model") as model:  # still a complete export
        assert model.manifest.raw == json.loads((dual_device / "dmpt_manifest.json").read_text())


def test_an_earlier_page_is_replaced_only_when_asked(
    dual_device: Path, modules: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["page", dual_device, tmp_path / "site", "--modules", modules]
    assert run(*line) == 0
    assert run(*line) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert run(*line, "--overwrite") == 0
    (tmp_path / "site" / "model" / "notes.txt").write_text("mine")
    assert run(*line, "--overwrite") == 3
    assert "also holds model" in capsys.readouterr().err


def test_what_cannot_become_a_page_is_refused(
    dual_device: Path, modules: Path, tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_onnx(saved_model(tmp_path / "bare", splits=[], heads=1), tmp_path / "no-tokenizer", verify=False)
    export_onnx(tiny_dmpt, tmp_path / "cuda", ExportOptions(target="cuda"), verify=False)
    export_onnx(tiny_dmpt, tmp_path / "standard", ExportOptions(layout="standard"), verify=False)
    save_quantized(tiny_dmpt, tmp_path / "quantized", "int8")
    export_onnx(tmp_path / "quantized", tmp_path / "earlier", verify=False)
    manifest = tmp_path / "earlier" / "dmpt_manifest.json"
    manifest.write_text(manifest.read_text().replace('"branches_inline": true,', ""))
    cases = [
        ("earlier", modules, "export the model again"),
        ("no-tokenizer", modules, "no tokenizer"),
        ("cuda", modules, "exported for cuda"),
        ("standard", modules, "standard layout"),
        ("nothing", modules, "is not a folder"),
    ]
    for name, packages, message in cases:
        assert run("page", tmp_path / name, tmp_path / "site", "--modules", packages) == 3
        assert message in capsys.readouterr().err
    assert run("page", dual_device, tmp_path / "site", "--modules", tmp_path) == 3
    assert "npm install onnxruntime-web @huggingface/tokenizers" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_the_npm_package_names_every_module() -> None:
    web = REPOSITORY / "runtime" / "web"
    package = json.loads((web / "package.json").read_text())
    assert set(package["files"]) == {path.name for path in web.glob("*.mjs")}
    locked = json.loads((web / "package-lock.json").read_text())["packages"][""]["devDependencies"]
    assert locked == package["devDependencies"]
