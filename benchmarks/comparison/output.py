"""The files of a comparison: JSON, Markdown, CSV, an HTML report and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.comparison.result import Comparison
from benchmarks.report import frontier
from benchmarks.report.page import page
from training.checkpoints.atomic import atomic_folder


def write(result: Comparison, folder: Path) -> None:
    """Write comparison.{json,md,csv}, report.html and, if a quality is known, comparison.svg to `folder`."""
    text = json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(result.as_markdown(), encoding="utf-8")
    (folder / "comparison.csv").write_text(result.as_csv(), encoding="utf-8")
    (folder / "report.html").write_text(page(result), encoding="utf-8")
    if result.has_picture:
        (folder / "comparison.svg").write_text(frontier.draw_file(result.rows), encoding="utf-8")


def save(result: Comparison, out: str | Path) -> None:
    """write() to a new folder in one step; an older comparison there is replaced."""
    with atomic_folder(out, "comparison") as folder:
        write(result, folder)
