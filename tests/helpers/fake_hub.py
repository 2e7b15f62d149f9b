"""Stands in for the `datasets` package and for the hub, so that tests of hub datasets need no network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training.text import sources


class FakeDataset:
    """The part of datasets.Dataset that is used."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> FakeDataset:
        return FakeDataset({name: self.columns[name] for name in names})

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        for start in range(0, len(next(iter(self.columns.values()))), batch_size):
            yield {name: values[start : start + batch_size] for name, values in self.columns.items()}


class FakeHub:
    """The module: answers every load_dataset() with `answer` (raised if it is an exception) and keeps the calls."""

    def __init__(self, answer: FakeDataset | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, str | None, str]] = []

    def load_dataset(self, name: str, config: str | None, *, split: str) -> FakeDataset:
        self.calls.append((name, config, split))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch, answer: FakeDataset | Exception) -> FakeHub:
        hub = cls(answer)
        monkeypatch.setitem(sys.modules, "datasets", hub)
        monkeypatch.setattr(sources, "find_spec", lambda name: True)
        return hub


def write_wikitext(folder: Path, rows: list[str]) -> None:
    """Lay out `folder` like Salesforce/wikitext on the hub: a card, Parquet files; {} in a row: name and split."""
    import pyarrow
    from pyarrow import parquet

    card = ["---", "configs:"]
    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        (folder / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation", "test"):
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
            table = pyarrow.table({"text": [row.format(f"{name} {split}") for row in rows]})
            parquet.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
