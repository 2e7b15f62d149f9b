"""One model's line of a comparison."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality import Quality
from benchmarks.results import Speed
from benchmarks.table import megabytes

HEADERS = (
    "model", "parameters", "touched per token", "file size", "perplexity", "accuracy", "decode tokens/s",
    "prefill tokens/s",
)  # fmt: skip
NONE = "-"
REASON = 90  # characters of a failure in the table


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table; quality is None without a text, speed for a checkpoint; both where it failed."""

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
    failure: str | None = None  # why it has no figures, or not all
    versions: dict[str, str] = field(default_factory=dict)  # of a peer's packages
    shape: dict[str, int] = field(default_factory=dict)  # paths, heads, fast_k: what speed may depend on

    @property
    def decode_tokens_per_s(self) -> float | None:
        return statistics.median(self.speed.first("tg").tokens_per_s) if self.speed else None

    def to_json(self) -> dict[str, Any]:
        own = ("name", "path", "kind", "family", "scheme", "control", "parameters", "parameters_touched_per_token")
        return {
            **{key: getattr(self, key) for key in (*own, "size_bytes", "failure", "versions", "shape")},
            **(self.quality.to_json() if self.quality else {}),
            **(self.speed.to_json() if self.speed else {}),
        }


def cells(row: Row) -> list[str]:
    """The row as HEADERS has it, with the reason after its name where it failed."""
    scored, timed = row.quality, row.speed.to_json() if row.speed else None
    return [
        row.name + (f" (failed: {short(row.failure)})" if row.failure else ""),
        f"{row.parameters:,}" if row.parameters else NONE,
        f"{row.parameters_touched_per_token:,}" if row.parameters else NONE,
        megabytes(row.size_bytes) if row.size_bytes else NONE,
        f"{scored.perplexity:.2f}" if scored else NONE,
        f"{100 * scored.accuracy:.1f} %" if scored else NONE,
        f"{timed['decode_tokens_per_s']:.1f}" if timed else NONE,
        f"{timed['prefill_tokens_per_s']:.0f}" if timed else NONE,
    ]


def short(reason: str) -> str:
    """One line of at most REASON characters; the JSON has all of it."""
    line = " ".join(reason.split())
    return line if len(line) <= REASON else f"{line[: REASON - 1]}…"
