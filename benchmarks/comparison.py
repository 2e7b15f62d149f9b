"""Several models side by side: what each weighs, how well it predicts, how fast it runs."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine as computer
from benchmarks import quality, speed
from benchmarks.cases import fit
from benchmarks.contestants import Entry as Entry  # this module's callers name their models with it
from benchmarks.contestants import Opener, check, failed_row, row_of
from benchmarks.processes import WorkerFailed
from benchmarks.ranking import front, rankings
from benchmarks.reading import reading
from benchmarks.report import routes
from benchmarks.row import HEADERS, Row, cells
from benchmarks.scorer import Scorer
from benchmarks.table import markdown
from training.errors import ValidationError

if TYPE_CHECKING:
    from training.model import DMPTForCausalLM

FORMAT_VERSION = 1
CSV = (
    "name", "kind", "family", "scheme", "control", "parameters", "parameters_touched_per_token", "size_bytes",
    "tokens_scored", "perplexity", "mean_nll", "standard_error", "accuracy", "decode_tokens_per_s",
    "decode_tokens_per_s_q1", "decode_tokens_per_s_q3", "prefill_tokens_per_s", "prefill_tokens_per_s_q1",
    "prefill_tokens_per_s_q3", "load_s", "rss_bytes", "peak_rss_bytes", "touched_bytes", "threads", "failure",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The finished table with all that is needed to judge it."""

    rows: list[Row]
    data: list[str]  # text files scored; empty: quality was not measured
    command: list[str]
    seeds: dict[str, int] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    machine: dict[str, Any] = field(default_factory=computer.machine)
    versions: dict[str, str] = field(default_factory=computer.versions)
    absent: list[str] = field(default_factory=list)  # peers that are not here, and how to get them
    routes: dict[str, Any] | None = None  # see benchmarks.report.routes.sample
    growth: list[dict[str, Any]] = field(default_factory=list)  # rows of `bench --json`, to be drawn beside

    @property
    def reading(self) -> str:
        """What the table says about DMPT, in one line; no claim without its control."""
        return reading(self.rows)

    def table(self) -> str:
        return markdown(HEADERS, [cells(row) for row in self.rows])

    def conditions(self) -> str:
        """How the numbers were made, in one line."""
        parts = []
        if scored := next((row.quality for row in self.rows if row.quality), None):
            parts.append(
                f"perplexity and top-1 accuracy of the deployed distribution on {scored.tokens_scored:,} tokens "
                f"(windows of {scored.max_length}, stride {scored.stride})"
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
        """Who leads, what failed, and which peers are not here: lines for below the table."""
        controls = {row.scheme for row in self.rows if row.control}
        alone = {row.name for row in self.rows if row.is_dmpt and row.scheme not in controls}

        def listed(names: Sequence[str]) -> str:
            return ", ".join(f"{name} (no control)" if name in alone else name for name in names)

        ordered = {what: names for what, names in rankings(self.rows).items() if len(names) > 1}
        lines = [f"Best first by {what}: {listed(names)}." for what, names in ordered.items()]
        if (ahead := front(self.rows)) and len(self.rows) > 1:
            lines.append(f"Beaten by no other in perplexity, decode time and size together: {listed(ahead)}.")
        lines += [f"{row.name} failed: {' '.join(row.failure.split())}" for row in self.rows if row.failure]
        return [*lines, *self.absent]

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
        picture = "![size against perplexity](comparison.png)\n" if self.has_picture else ""
        notes = "".join(f"- {line}\n" for line in self.notes())
        return f"# Comparison\n\n{self.table()}\n\n{self.reading}\n\n{notes}\n{self.conditions()}\n\n{picture}"

    def as_csv(self) -> str:
        """A header, then a line for each model; empty where nothing is known."""
        out = io.StringIO()
        writer = csv.DictWriter(out, CSV, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.to_json() for row in self.rows)
        return out.getvalue()

    @property
    def has_picture(self) -> bool:
        """Whether there is a perplexity to draw."""
        return any(row.quality for row in self.rows)

    def write(self, folder: Path) -> None:
        """comparison.{json,md,csv}, report.html and, when perplexities are known, comparison.png, into `folder`."""
        from benchmarks.report.page import page

        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
        (folder / "comparison.md").write_text(self.as_markdown(), encoding="utf-8")
        (folder / "comparison.csv").write_text(self.as_csv(), encoding="utf-8")
        (folder / "report.html").write_text(page(self), encoding="utf-8")
        if self.has_picture:
            from benchmarks.picture import draw

            draw(self.rows, folder / "comparison.png")

    def save(self, out: str | Path) -> None:
        """write() into a new folder, in one step; an older comparison there is replaced."""
        from training.checkpoint import atomic_folder

        with atomic_folder(out, "comparison") as folder:
            self.write(folder)


def compare(
    entries: Sequence[Entry],
    data: Sequence[str | Path] = (),
    out: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    max_length: int | None = None,
    stride: int | None = None,
    prompt: int = 128,
    gen: int = 64,
    repetitions: int = 5,
    seeds: dict[str, int] | None = None,
    command: Sequence[str] | None = None,
    dequantize: Callable[[str | Path], DMPTForCausalLM] | None = None,
    pythons: dict[str, str] | None = None,
    absent: Sequence[str] = (),
    growth: Sequence[dict[str, Any]] = (),
    show: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Measure every entry on the same text and in one interleaved schedule; write the result to `out` if given.

    data: text files to score; none leaves quality out. prompt, gen, repetitions: see benchmarks.speed.measure,
    the prompt is the beginning of the text; with `out` decoding is also timed at the end of the context.
    seeds: recorded as they are, with the prompt's. pythons: interpreters that hold peers, by peer. absent: lines about
    peers that are not here. growth: rows of `bench --json` to be drawn beside. show: given the result before it is
    written, so that a full disk does not take it away. Raises InputError for unusable entries before anything long
    begins; a peer that fails, and whatever fails while it is timed, is a row that says why.
    """
    context = check(list(entries), out)
    max_length, stride = quality.choose_windows(context, max_length, stride)  # the same windows for all
    texts: dict[str, NDArray[np.int32]] = {}
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dmpt-compare-") as work:
        opener = Opener(Path(work), threads, device, dequantize, pythons or {})
        rows = [scored(entry, opener, data, texts, (max_length, stride), samples) for entry in entries]
        # Several tokenizers have no prompt in common: random ids then.
        text = next(iter(texts.values())).tolist() if len(texts) == 1 else None
        targets = [opener.target(e) for e, row in zip(entries, rows, strict=True) if row.size_bytes]
        prompt, gen = fit(prompt, gen, context)
        depth = [prompt, context - gen] if out is not None and context - gen > prompt else None
        failures: dict[str, str] = {}
        timed = speed.measure(
            [t for t in targets if t], prompt, gen, repetitions, threads, device, text, depth=depth, failures=failures
        )  # fmt: skip
    by_name = {result.name: result for result in timed}
    rows = [replace(r, speed=by_name.get(r.name), failure=r.failure or failures.get(r.name)) for r in rows]
    result = Comparison(
        rows=rows,
        data=[str(path) for path in data],
        command=list(command or computer.command_line()),
        seeds={"prompt": speed.SEED, **(seeds or {})},
        absent=list(absent),
        routes=max(samples, key=lambda sample: sample["heads"], default=None),
        growth=list(growth),
    )
    if show is not None:
        show(result)
    if out is not None:
        result.save(out)
    return result


def scored(
    entry: Entry,
    opener: Opener,
    data: Sequence[str | Path],
    texts: dict[str, NDArray[np.int32]],
    windows: tuple[int, int],
    samples: list[dict[str, Any]],
) -> Row:
    """The entry's row with its quality; of a peer that fails, the row that says why. `samples` gets a DMPT's routes."""
    row = None
    try:
        scorer = opener.open(entry)
        try:
            row = replace(row_of(entry, scorer), versions=opener.versions(entry))
            ids = tokens(scorer, data, texts) if data else None
            if ids is None:
                return row
            row = replace(row, quality=quality.evaluate(scorer, ids, *windows))
            if row.is_dmpt and (sample := routes.sample(scorer, ids)):
                samples.append(sample)
            return row
        finally:
            scorer.close()
    except (WorkerFailed, ValidationError, OSError) as error:
        if entry.peer is None:
            raise
        return replace(row or failed_row(entry, ""), failure=str(error))


def tokens(scorer: Scorer, data: Sequence[str | Path], texts: dict[str, NDArray[np.int32]]) -> NDArray[np.int32]:
    """The text's ids, tokenised once per tokenizer; `texts` keeps them."""
    key = hashlib.sha256(f"{scorer.end_of_text} {scorer.tokenizer.to_str()}".encode()).hexdigest()
    if key not in texts:
        texts[key] = quality.read_tokens(scorer, data)
    return texts[key]
