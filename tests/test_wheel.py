"""The wheel holds the whole package and runs a model where no checkout is; the sdist holds the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dmpt_export import __version__, load
from dmpt_export.onnx.export import export_onnx
from tests.helpers.paths import REPOSITORY

PACKAGES = ("dmpt_export", "training", "quant", "runtime", "benchmarks")
BESIDE = (
    "CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "RESULTS.md", "SECURITY.md",
    "constraints-transformers4.txt", "constraints.txt", "pyproject.toml",
)  # fmt: skip


NOT_OURS = shutil.ignore_patterns("__pycache__", "results", "node_modules")
PLACED = "dmpt_export/integrations/"  # its files go among those of other packages


def packaged(folder: Path) -> dict[str, bytes]:
    """Files of the five packages by their path, as a wheel should have them."""
    files = (file for name in (*PACKAGES, "optimum") for file in (folder / name).rglob("*") if file.is_file())
    kinds = (".py", ".json", ".toml", ".md", ".mjs", ".html", ".css", ".typed")
    return {
        file.relative_to(folder).as_posix().removeprefix(PLACED): file.read_bytes()
        for file in files
        if file.suffix in kinds and not {"__pycache__", "node_modules"} & {*file.parts}
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="70.1", reason="setuptools 70.1 builds the wheel: install [dev]")
    source = tmp_path_factory.mktemp("source")  # building writes into its folder
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=NOT_OURS)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        "--wheel-dir",
        str(out),
        str(source),
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / f"dmpt_export-{__version__}-py3-none-any.whl"


def test_the_sdist_holds_what_the_tests_and_documents_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="70.1", reason="setuptools 70.1 builds the sdist: install [dev]")
    source, ours = tmp_path / "source", (*PACKAGES, "tests", "docs")  # building writes into its folder
    for name in ours:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in BESIDE:
        shutil.copyfile(REPOSITORY / name, source / name)
    (source / "tests" / "__pycache__").mkdir()
    (source / "tests" / "__pycache__" / "test_wheel.pyc").touch()
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"dmpt_export-{__version__}.tar.gz") as archive:
        found = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    expected = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    made = {name for name in expected | found if name.startswith("dmpt_export.egg-info/") or name.endswith(".pyc")}
    assert found - made == expected - made | {"PKG-INFO", "setup.cfg"}
    assert not [name for name in found if name.endswith(".pyc")]


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert packaged(tmp_path) == packaged(REPOSITORY)
    metadata = (tmp_path / f"dmpt_export-{__version__}.dist-info" / "METADATA").read_text()
    for extra in ("cpu", "cuda", "serve", "train", "bench", "data", "bnb"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_an_installed_wheel_runs_a_model(wheel: Path, tiny_dmpt: Path, tmp_path: Path) -> None:
    export_onnx(tiny_dmpt, tmp_path / "device", verify=False)
    site = tmp_path / "site"
    install = ["install", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel)]
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import dmpt_export, runtime\n"
        "print(dmpt_export.__file__); print(runtime.__file__)\n"
        "with dmpt_export.load('device') as model:\n"
        "    print(ascii(model.generate('The mill', max_new_tokens=3, temperature=0)))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    first, second, written = done.stdout.splitlines()
    assert Path(first).is_relative_to(site)
    assert Path(second).is_relative_to(site)
    with load(tmp_path / "device") as model:
        assert written == ascii(model.generate("The mill", max_new_tokens=3, temperature=0))
    run = [sys.executable, "-m", "dmpt_export", "run", "device", "The mill", "--max-new-tokens", "3"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
