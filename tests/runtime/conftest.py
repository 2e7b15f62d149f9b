"""A server of a tiny model, for tests/runtime/test_server*.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.model import Model
from runtime.session import Engine
from tests.helpers.serving import Served, serving


@pytest.fixture(scope="module")
def model(dual_device: Path) -> Iterator[Model]:
    with runtime.load(dual_device, threads=1) as loaded:
        loaded.ends = frozenset()  # texts have the requested length
        yield loaded


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving(model) as one:
        yield one


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a graph takes 20 ms."""
    run = Engine.run

    def late(self: Engine, *arguments: Any, **more: Any) -> None:
        time.sleep(0.02)
        run(self, *arguments, **more)

    monkeypatch.setattr(Engine, "run", late)
