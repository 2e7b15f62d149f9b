"""Put the measured figures of a comparison on a model folder's card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import FieldError, InputError

FORMAT, FORMAT_VERSION = "dmpt-comparison", 1  # of benchmarks.comparison.result


@dataclass(frozen=True)
class Found:
    """Everything that check() read."""

    card: Path
    text: str | None  # of the card; None: there is none yet
    row: dict[str, Any]  # of the model
    about: dict[str, Any]  # the whole comparison


@dataclass(frozen=True)
class CardRequest:
    model: str  # ONNX, DMPT or quantized folder
    comparison: str  # comparison.json of `compare`, or the folder that holds it
    row: str | None = None  # name of the model there; None: the row whose folder this is

    def check(self) -> Found:
        """Raise InputError for a folder or file that cannot be used, or figures of another model."""
        folder = Path(self.model)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give the model folder whose card gets the figures")
        about = read_comparison(Path(self.comparison))
        row = self.row_of(about["rows"])
        check_row(folder, row)
        card = folder / "README.md"
        return Found(card, read_card(card), row, about)

    def row_of(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's row. Raises InputError where there is none, or several."""
        if self.row is not None:
            found = [row for row in rows if row["name"] == self.row]
        else:
            found = [row for row in rows if Path(row["path"]).resolve() == Path(self.model).resolve()]
        if len(found) != 1:
            names = ", ".join(row["name"] for row in rows)
            raise FieldError(
                "{} has {} rows {}: choose one with {row}: {}", self.comparison, len(found) or "no",
                f"for {self.model}" if self.row is None else f"named {self.row}", names,
            )  # fmt: skip
        return found[0]

    def run(self, found: Found) -> Path:
        """Write the card, after check()."""
        from benchmarks.report.card import with_figures
        from training.checkpoints.atomic import atomic_file

        before = f"# {found.row['name']}\n" if found.text is None else found.text
        after = with_figures(before, Path(self.model).resolve().name, found.row, found.about)
        with atomic_file(found.card) as temporary:
            temporary.write_text(after, encoding="utf-8")
        return found.card


def read_comparison(path: Path) -> dict[str, Any]:
    """comparison.json. Raises InputError for anything else."""
    from benchmarks.report.card import ABOUT
    from runtime.schema import faults
    from training.checkpoints.files import read_json

    about = read_json(path / "comparison.json" if path.is_dir() else path)
    if (about.get("format"), about.get("format_version")) != (FORMAT, FORMAT_VERSION) or not about.get("rows"):
        raise InputError(f"{path} is not a comparison: give the comparison.json that `dmpt-export compare --out` wrote")
    if problems := faults(about, ABOUT):
        raise InputError(f"{path} is damaged ({problems[0]}): compare again")
    return about


def read_card(path: Path) -> str | None:
    """The text of a card; None without one. Raises InputError for a file that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): write it again, or move it away") from error


def check_figures(row: dict[str, Any]) -> None:
    """Raise InputError for a row that lacks a figure or a condition of it."""
    from benchmarks.report.card import row_form
    from runtime.schema import faults

    if problems := faults(row, row_form(row)):
        raise InputError(f"the figures of {row['name']} are damaged ({problems[0]}): compare it again")


def check_row(folder: Path, row: dict[str, Any]) -> None:
    """Raise InputError where a row is about another model, or a failed one, as far as size and scheme show."""
    from benchmarks.quality.scorer import kind_of, onnx_size, scheme_of_source, weight_files

    if row.get("failure"):
        raise InputError(f"{row['name']} failed in this comparison: compare it again")
    check_figures(row)
    kind = kind_of(folder)
    size = onnx_size(folder) if kind == "onnx" else sum(file.stat().st_size for file in weight_files(folder))
    own = {"kind": kind, "scheme": scheme_of_source(folder), "size_bytes": size}
    if unlike := [name for name, value in own.items() if row[name] != value]:
        seen = ", ".join(f"{name} {row[name]} instead of {own[name]}" for name in unlike)
        raise InputError(
            f"the figures of {row['name']} are those of another model than {folder} ({seen}): compare it again"
        )
