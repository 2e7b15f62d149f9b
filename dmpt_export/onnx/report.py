"""The quantization report beside an export: written from what was read, so that it holds nothing but a report."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quant.rules import FLOAT
from quant.schemes import SCHEMES
from quant.schemes.low_rank import DELTAS
from runtime.manifest_file import REPORT_NAME
from runtime.schema import BOOL, COUNT_OR_NULL, ID, NAME, NUMBER, NUMBER_OR_NULL, faults
from training.checkpoints.files import read_json
from training.errors import InputError

TOTAL = {"weights": ID, "bytes_before": ID, "bytes_after": ID, "bits_per_weight": NUMBER}
TENSOR = {
    "name": NAME, "scheme": NAME, "block": COUNT_OR_NULL, "weights": ID, "bytes_before": ID, "bytes_after": ID,
    "relative_error": NUMBER, "bits_per_weight": NUMBER,
}  # fmt: skip
LATER = {"all_zero": BOOL, "kl": NUMBER_OR_NULL, "delta_error": NUMBER_OR_NULL}  # may be absent


def copy_report(source: Path, target: Path, names: Collection[str]) -> None:
    """Write the report of a quantized folder, if it has one, into an export of it: sizes and errors of each tensor.

    names: of the folder's tensors. Raises InputError for any other file of that name.
    """
    path = source / REPORT_NAME
    if not path.is_file():
        return
    report = read_json(path)
    problems = faults(report, {"total": TOTAL, "tensors": [TENSOR]})
    problems = problems or [fault for entry in report["tensors"] for fault in wrong_with(entry, names)]
    if problems:
        raise InputError(f"{path} is no report on these weights, delete it or quantize again: {problems[0]}")
    kept = [{key: value for key, value in entry.items() if key in TENSOR | LATER} for entry in report["tensors"]]
    total = {key: report["total"][key] for key in TOTAL}
    (target / REPORT_NAME).write_text(json.dumps({"total": total, "tensors": kept}, indent=1) + "\n", encoding="utf-8")


def wrong_with(entry: dict[str, Any], names: Collection[str]) -> list[str]:
    """What a tensor's entry says of no tensor here."""
    if entry["name"] not in names:
        return [f"{entry['name'][:40]!r} is not one of its tensors"]
    if entry["scheme"] not in (*SCHEMES, *DELTAS, FLOAT):
        return [f"{entry['name']} has the unknown scheme {entry['scheme'][:40]!r}"]
    return faults(entry, {key: form for key, form in LATER.items() if key in entry}, entry["name"])
