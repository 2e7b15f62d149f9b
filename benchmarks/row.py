"""One model's line of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.quality import Quality
from benchmarks.results import Speed
from benchmarks.table import megabytes

HEADERS = (
    "model", "parameters", "touched per token", "file size", "perplexity", "accuracy", "decode tokens/s",
    "prefill tokens/s",
)  # fmt: skip
NONE = "-"


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table; quality is None without a text, speed for what is not an ONNX folder."""

    name: str
    path: str
    kind: str  # "onnx", "quantized" or "float"
    is_dmpt: bool
    family: str
    scheme: str
    control: bool
    parameters: int
    parameters_touched_per_token: int
    size_bytes: int
    quality: Quality | None = None
    speed: Speed | None = None

    def to_json(self) -> dict[str, Any]:
        own = ("name", "path", "kind", "family", "scheme", "control", "parameters", "parameters_touched_per_token")
        return {
            **{key: getattr(self, key) for key in (*own, "size_bytes")},
            **(self.quality.to_json() if self.quality else {}),
            **(self.speed.to_json() if self.speed else {}),
        }


def cells(row: Row) -> list[str]:
    """The row as HEADERS has it."""
    scored, timed = row.quality, row.speed.to_json() if row.speed else None
    return [
        row.name,
        f"{row.parameters:,}",
        f"{row.parameters_touched_per_token:,}",
        megabytes(row.size_bytes),
        f"{scored.perplexity:.2f}" if scored else NONE,
        f"{100 * scored.accuracy:.1f} %" if scored else NONE,
        f"{timed['decode_tokens_per_s']:.1f}" if timed else NONE,
        f"{timed['prefill_tokens_per_s']:.0f}" if timed else NONE,
    ]
