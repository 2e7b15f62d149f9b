"""The finished comparison: its table, notes, files."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine as this_machine
from benchmarks.comparison.doubts import noise
from benchmarks.comparison.equal_training import controls, training_notes
from benchmarks.comparison.findings import reading
from benchmarks.comparison.model_result import PERPLEXITY, Row, cells, columns, merit
from benchmarks.comparison.ranking import front, rankings
from benchmarks.quality.protocols import STRIDE_CONCAT
from benchmarks.report.table import markdown

FORMAT_VERSION = 1

CSV = (
    "name", "kind", "family", "scheme", "control", "parameters", "parameters_touched_per_token", "size_bytes",
    "protocol", "tokens_scored", "perplexity", "mean_nll", "standard_error", "word_perplexity", "bits_per_byte",
    "accuracy", "top5_accuracy", "decode_tokens_per_s", "decode_tokens_per_s_q1", "decode_tokens_per_s_q3",
    "prefill_tokens_per_s", "prefill_tokens_per_s_q1", "prefill_tokens_per_s_q3", "load_s", "rss_bytes",
    "peak_rss_bytes", "touched_bytes", "threads", "failure",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The finished table with the conditions of its measurement."""

    rows: list[Row]
    data: list[str]  # text files scored; empty: quality was not measured
    command: list[str]
    seeds: dict[str, int] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    machine: dict[str, Any] = field(default_factory=this_machine.machine)
    versions: dict[str, str] = field(default_factory=this_machine.versions)
    absent: list[str] = field(default_factory=list)  # peers that are not installed, and how to install them
    routes: dict[str, Any] | None = None  # see benchmarks.report.routes.sample
    growth: list[dict[str, Any]] = field(default_factory=list)  # rows of `bench --json`, drawn in the growth curves
    unscored: list[str] = field(default_factory=list)  # names of the models without a row yet, when stopped early

    @property
    def failed(self) -> list[str]:
        """Names of the models, without peers, that lack some of their figures."""
        return [row.name for row in self.rows if row.failure and row.kind != "peer"]

    @property
    def reading(self) -> str:
        """What the table shows about DMPT, in one line; no claim without the control, or from a part of the table."""
        if self.unscored:
            return f"Not scored when stopped: {', '.join(self.unscored)}. A complete table compares DMPT and control."
        return reading(self.rows)

    def table(self) -> str:
        names = columns(self.rows)
        return markdown(names, [[cells(row)[name] for name in names] for row in self.rows])

    def conditions(self) -> str:
        """How the numbers were measured, in one line."""
        parts = []
        if scored := [row.quality for row in self.rows if row.quality]:
            first, tokens = scored[0], sorted({f"{q.tokens_scored:,}" for q in scored})
            what = "perplexity and top-1 accuracy" if merit(self.rows) == PERPLEXITY else "quality"
            parts.append(
                f"{what} of the deployed distribution on {' or '.join(tokens)} tokens "
                f"({first.protocol}, windows of {first.max_length}, stride {first.stride})"
            )
        if timed := next((row.speed for row in self.rows if row.speed), None):
            prefill, decode = timed.first("pp"), timed.first("tg")
            parts.append(
                f"speed on {timed.threads} thread{'s' * (timed.threads > 1)}, batch 1: "
                f"prefill of {prefill.case.tokens} tokens, then {decode.case.tokens} decoded; "
                f"medians of {len(decode.tokens_per_s)} interleaved rounds"
            )
        cpu = f"{self.machine['cpu']}, {self.machine['cores']} cores"
        return ". ".join(part[0].upper() + part[1:] for part in [*parts, cpu]) + "."

    def notes(self) -> list[str]:
        """Lines below the table: rankings, differences in training, failures, and peers that are not installed."""
        alone = {row.name for row in self.rows if row.is_dmpt and row.scheme not in controls(self.rows)}

        def listed(names: Sequence[str]) -> str:
            return ", ".join(f"{name} (no control)" if name in alone else name for name in names)

        ordered = {what: names for what, names in rankings(self.rows).items() if len(names) > 1}
        lines = [f"Best first by {what}: {listed(names)}." for what, names in ordered.items()]
        if (ahead := front(self.rows)) and len(self.rows) > 1:
            line = f"Best trade-offs of {merit(self.rows)}, decode time and size: {listed(ahead)}."
            others = len([row for row in self.rows if row.quality and row.speed]) > len(ahead)
            lines.append(line + " For each other timed model, one of these is at least as good in all three." * others)
        if merit(self.rows) != PERPLEXITY:
            lines.append(self.unlike_tokens())
        lines += training_notes(self.rows) + noise(self.rows)
        lines += [f"{row.name} failed: {' '.join(row.failure.split())}" for row in self.rows if row.failure]
        return [*lines, *self.absent]

    def unlike_tokens(self) -> str:
        """The note on which figures compare between different tokenizers."""
        scored = [row.quality for row in self.rows if row.quality]
        line = "The tokenizers differ, so perplexities per token do not compare; those per word and bits per byte do."
        counts = {q.bytes_scored for q in scored if q.bytes_scored}
        if len(counts) > 1 and scored[0].protocol == STRIDE_CONCAT:
            line += (
                f" They scored {min(counts):,} to {max(counts):,} bytes: {STRIDE_CONCAT} leaves out the first "
                "tokens, which matters for a short text; --protocol sliding scores all."
            )
        return line

    def to_json(self) -> dict[str, Any]:
        keys = ("reading", "data", "command", "seeds", "created", "machine", "versions", "absent", "routes", "growth")
        return {
            "format": "dmpt-comparison",
            "format_version": FORMAT_VERSION,
            "rows": [row.to_json() for row in self.rows],
            "rankings": rankings(self.rows),
            "front": front(self.rows),
            **{key: getattr(self, key) for key in keys},
        }

    def as_markdown(self) -> str:
        picture = f"![size against {merit(self.rows)}](comparison.svg)\n" if self.has_picture else ""
        notes = "".join(f"- {line}\n" for line in self.notes())
        return f"# Comparison\n\n{self.table()}\n\n{self.reading}\n\n{notes}\n{self.conditions()}\n\n{picture}"

    def as_csv(self) -> str:
        """A header, then one line per model; unknown values are empty."""
        out = io.StringIO()
        writer = csv.DictWriter(out, CSV, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.to_json() for row in self.rows)
        return out.getvalue()

    @property
    def has_picture(self) -> bool:
        """Whether any row has a quality to draw."""
        return any(row.figure(merit(self.rows)) is not None for row in self.rows)
