"""A missing optional dependency is reported in one clear line before any work."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

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


def test_the_check_imports_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "explosive.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(extras.MODULES, "train", ("explosive",))
    extras.require("train")
