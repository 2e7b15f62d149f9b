"""One row of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.perplexity import Quality
from benchmarks.report.table import megabytes, readable
from benchmarks.speed.noise import mark
from benchmarks.speed.results import Speed
from training.checkpoints.record import Record

NONE = "-"
REASON = 90  # characters of a failure in the table
PERPLEXITY, BITS_PER_BYTE = "perplexity", "bits per byte"
# Quality of the predictions; lower is better.
FIGURES: Mapping[str, Callable[[Quality], float | None]] = {
    PERPLEXITY: lambda quality: quality.perplexity,
    BITS_PER_BYTE: lambda quality: quality.bits_per_byte,
}


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the table: without a text no quality, for a checkpoint no speed, for a failed model neither."""

    name: str
    path: str
    kind: str  # "onnx", "quantized", "float" or "peer"
    is_dmpt: bool
    family: str
    scheme: str
    control: bool
    parameters: int
    parameters_touched_per_token: int
    size_bytes: int
    quality: Quality | None = None
    speed: Speed | None = None
    failure: str | None = None  # why some or all figures are missing
    versions: dict[str, str] = field(default_factory=dict)  # of a peer's packages
    graph: str | None = None  # sha256 of an exported graph, without its weights
    training: Record | None = None  # what it was trained on; None: not recorded
    shape: dict[str, int] = field(default_factory=dict)  # paths, heads, fast_k: factors that speed may depend on

    @property
    def is_checkpoint(self) -> bool:
        """Not exported, and so not timed."""
        return self.kind in ("float", "quantized")

    def figure(self, name: str) -> float | None:
        """One of FIGURES; None if not measured."""
        return FIGURES[name](self.quality) if self.quality else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        return statistics.median(self.speed.first("tg").tokens_per_s) if self.speed else None

    def to_json(self) -> dict[str, Any]:
        own = ("name", "path", "kind", "family", "scheme", "control", "parameters", "parameters_touched_per_token")
        return {
            **{key: getattr(self, key) for key in (*own, "size_bytes", "failure", "versions", "shape")},
            "training": self.training.to_json() if self.training else None,
            **(self.quality.to_json() if self.quality else {}),
            **(self.speed.to_json() if self.speed else {}),
        }


def merit(rows: Sequence[Row]) -> str:
    """The one of FIGURES that ranks these rows: perplexity if all scored the same tokens, else bits per byte.

    Perplexity is per token, so it does not compare between models with different tokens.
    """
    return PERPLEXITY if len({row.quality.tokens_sha256 for row in rows if row.quality}) < 2 else BITS_PER_BYTE


def cells(row: Row) -> dict[str, str]:
    """All cells of a row by column; a failed model has the reason after its name."""
    scored, timed = row.quality, row.speed.to_json() if row.speed else None
    return {
        "model": row.name + (f" (failed: {short(row.failure)})" if row.failure else ""),
        "parameters": f"{row.parameters:,}" if row.parameters else NONE,
        "touched per token": f"{row.parameters_touched_per_token:,}" if row.parameters else NONE,
        "file size": megabytes(row.size_bytes) if row.size_bytes else NONE,
        PERPLEXITY: readable(scored.perplexity) if scored else NONE,
        "accuracy": f"{100 * scored.accuracy:.1f} %" if scored else NONE,
        "word perplexity": readable(scored.word_perplexity) if scored and scored.word_perplexity else NONE,
        BITS_PER_BYTE: f"{scored.bits_per_byte:.4f}" if scored and scored.bits_per_byte else NONE,
        "decode tokens/s": f"{timed['decode_tokens_per_s']:.1f}{unsteady(row, 'tg')}" if timed else NONE,
        "prefill tokens/s": f"{timed['prefill_tokens_per_s']:.0f}{unsteady(row, 'pp')}" if timed else NONE,
    }


def unsteady(row: Row, kind: str) -> str:
    """A mark behind a speed whose rounds scatter."""
    return mark(row.speed.first(kind).tokens_per_s) if row.speed else ""


def columns(rows: Sequence[Row]) -> list[str]:
    """Columns of cells() that compare between these rows: with several tokenizers, none that is per token."""
    own = [PERPLEXITY, "accuracy"] if merit(rows) == PERPLEXITY else ["word perplexity", BITS_PER_BYTE]
    return ["model", "parameters", "touched per token", "file size", *own, "decode tokens/s", "prefill tokens/s"]


def short(reason: str) -> str:
    """One line of at most REASON characters; the JSON has the full text."""
    line = " ".join(reason.split())
    return line if len(line) <= REASON else f"{line[: REASON - 1]}…"
