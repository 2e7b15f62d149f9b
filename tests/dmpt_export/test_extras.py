"""A missing optional dependency is reported in one clear line before any work."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dmpt_export import extras
from tests.helpers.paths import REPOSITORY
from training.errors import install

PYPROJECT = REPOSITORY / "pyproject.toml"


def test_installed_extras_pass() -> None:
    extras.require("cpu", "train")


def test_missing_modules_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.MODULES, "train", ("json", "no_such_torch", "no_such_onnx"))
    monkeypatch.setitem(extras.MODULES, "bench", ("no_such_plot",))
    with pytest.raises(extras.MissingExtra) as caught:
        extras.require("train", "cpu", "bench")
    needed, how = "no_such_torch, no_such_onnx, no_such_plot", install("train", "bench")
    assert str(caught.value) == f"this command needs {needed}: {how}"
    assert how == "pip install 'dmpt-export[train,bench]'"
    assert caught.value.exit_code == 3


def test_every_extra_is_one_of_pyproject() -> None:
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert set(extras.MODULES) == set(declared) - {"all", "dev"}


# The last version of each package with a known hole, or (tokenizers, datasets) without what is relied on.
HOLES = {
    "click": "8.3.2",  # CVE-2026-7246
    "datasets": "3.6.0",  # runs code of a data set
    "onnx": "1.20.1",  # CVE-2026-28500, CVE-2026-34445
    "onnxruntime": "1.30.0",
    "onnxruntime-gpu": "1.30.0",
    "protobuf": "6.33.4",  # CVE-2026-0994
    "tokenizers": "0.21.4",  # no version of Transformers that is tested takes it
    "torch": "2.9.1",  # CVE-2026-24747
}


def requirements() -> dict[str, Requirement]:
    """Every requirement of pyproject.toml, by extra and package."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    found = {f"{extra}: {text}": Requirement(text) for extra, texts in lists.items() for text in texts}
    return {where: entry for where, entry in found.items() if entry.name != "dmpt-export"}


def test_versions_with_known_holes_are_left_out() -> None:
    declared = requirements()
    assert set(HOLES) <= {entry.name for entry in declared.values()}
    for where, entry in declared.items():
        if entry.name in HOLES:
            assert not entry.specifier.contains(HOLES[entry.name]), where
    engines = [where for where, entry in declared.items() if entry.name.startswith(("onnxruntime", "onnx", "torch"))]
    assert len(engines) == 5  # cpu, cuda; train's three


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-transformers4.txt"])
def test_the_tested_versions_are_allowed(file: str) -> None:
    lines = (REPOSITORY / file).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for where, entry in requirements().items():
        if entry.name in pinned:
            assert entry.specifier.contains(pinned[entry.name]), where


def test_the_check_imports_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "explosive.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(extras.MODULES, "train", ("explosive",))
    extras.require("train")
