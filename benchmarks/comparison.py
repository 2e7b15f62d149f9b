"""Several models side by side: what each weighs, how well it predicts, how fast it runs."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import machine as computer
from benchmarks import quality, speed
from benchmarks.cases import fit
from benchmarks.contestants import Entry as Entry  # this module's callers name their models with it
from benchmarks.contestants import Opener, check, failed_row, row_of
from benchmarks.contestants import Settings as Settings
from benchmarks.protocols import STRIDE_CONCAT, Text, plan
from benchmarks.ranking import front, rankings
from benchmarks.reading import reading
from benchmarks.report import routes
from benchmarks.row import PERPLEXITY, Row, cells, columns, merit
from benchmarks.scorer import Scorer
from benchmarks.table import markdown
from runtime.errors import is_out_of_memory
from training.errors import InputError

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
    def failed(self) -> list[str]:
        """Names of the models, peers left aside, that have not all their figures."""
        return [row.name for row in self.rows if row.failure and row.kind != "peer"]

    @property
    def reading(self) -> str:
        """What the table says about DMPT, in one line; no claim without its control."""
        return reading(self.rows)

    def table(self) -> str:
        names = columns(self.rows)
        return markdown(names, [[cells(row)[name] for name in names] for row in self.rows])

    def conditions(self) -> str:
        """How the numbers were made, in one line."""
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
        """Who leads, what failed, and which peers are not here: lines for below the table."""
        controls = {row.scheme for row in self.rows if row.control}
        alone = {row.name for row in self.rows if row.is_dmpt and row.scheme not in controls}

        def listed(names: Sequence[str]) -> str:
            return ", ".join(f"{name} (no control)" if name in alone else name for name in names)

        ordered = {what: names for what, names in rankings(self.rows).items() if len(names) > 1}
        lines = [f"Best first by {what}: {listed(names)}." for what, names in ordered.items()]
        if (ahead := front(self.rows)) and len(self.rows) > 1:
            lines.append(f"Beaten by no other in {merit(self.rows)}, decode time and size together: {listed(ahead)}.")
        if merit(self.rows) != PERPLEXITY:
            lines.append(self.unlike_tokens())
        lines += [f"{row.name} failed: {' '.join(row.failure.split())}" for row in self.rows if row.failure]
        return [*lines, *self.absent]

    def unlike_tokens(self) -> str:
        """What compares between models of several tokenizers, and how far."""
        scored = [row.quality for row in self.rows if row.quality]
        line = "The tokenizers differ, so perplexities per token do not compare: words and bytes do."
        counts = {q.bytes_scored for q in scored if q.bytes_scored}
        if len(counts) > 1 and scored[0].protocol == STRIDE_CONCAT:
            line += (
                f" They scored {min(counts):,} to {max(counts):,} bytes: {STRIDE_CONCAT} leaves out a number of first "
                "tokens, which decides on a short text; --protocol sliding scores all."
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
        picture = f"![size against {merit(self.rows)}](comparison.png)\n" if self.has_picture else ""
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
        """Whether there is a quality to draw."""
        return any(row.figure(merit(self.rows)) is not None for row in self.rows)

    def write(self, folder: Path) -> None:
        """comparison.{json,md,csv}, report.html and, when a quality is known, comparison.png, into `folder`."""
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
    settings: Settings | None = None,
    *,
    seeds: dict[str, int] | None = None,
    command: Sequence[str] | None = None,
    absent: Sequence[str] = (),
    growth: Sequence[dict[str, Any]] = (),
    show: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Measure every entry on the same text and in one interleaved schedule; write the result to `out` if given.

    data: text files to score; none leaves quality out. The prompt is the beginning of the text; with `out` decoding
    is also timed at the end of the context. seeds: recorded as they are, with the prompt's. absent: lines about
    peers that are not here. growth: rows of `bench --json` to be drawn beside. show: given the result before it is
    written, so that a full disk does not take it away. Raises InputError for unusable entries, before anything long
    begins, and for an unusable text; a model that fails later is a row that says why.
    """
    settings, context = settings or Settings(), check(list(entries), out)
    # the same windows for all
    windows = quality.choose_windows(context, settings.max_length, settings.stride, settings.protocol)
    texts = Texts(data, settings, windows)
    samples: list[dict[str, Any]] = []
    with workplace(settings) as work:
        opener = Opener(work, settings)
        rows = [scored(entry, opener, texts, samples) for entry in entries]
        rows = timed(entries, rows, opener, texts.in_common(), context, at_the_end=out is not None)
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


@contextmanager
def workplace(settings: Settings) -> Iterator[Path]:
    """The folder for converted peers and scores: one that stays, or one that goes."""
    if settings.resume is not None:
        Path(settings.resume).mkdir(parents=True, exist_ok=True)
        yield Path(settings.resume)
        return
    with tempfile.TemporaryDirectory(prefix="dmpt-compare-") as work:
        yield Path(work)


class Texts:
    """The text as each tokenizer reads it, read once per tokenizer."""

    def __init__(self, data: Sequence[str | Path], settings: Settings, windows: tuple[int, int]) -> None:
        self.data, self.settings, self.windows = data, settings, windows
        self.read: dict[str, Text] = {}

    def of(self, scorer: Scorer) -> Text | None:
        """None without a text. Raises InputError for one that cannot be read, or is too short."""
        if not self.data:
            return None
        key = hashlib.sha256(f"{scorer.end_of_text} {scorer.tokenizer.to_str()}".encode()).hexdigest()
        if key not in self.read:
            protocol = self.settings.protocol
            self.read[key] = quality.read_text(scorer, self.data, self.settings.text_field, protocol)
            try:
                plan(len(self.read[key].ids), *self.windows, protocol)
            except InputError as error:
                raise InputError(f"as {scorer.name} reads it, {error}") from error
        return self.read[key]

    def in_common(self) -> list[int] | None:
        """The tokens that prompts are taken from; None for several tokenizers, which have none in common."""
        return next(iter(self.read.values())).ids.tolist() if len(self.read) == 1 else None


def scored(entry: Entry, opener: Opener, texts: Texts, samples: list[dict[str, Any]]) -> Row:
    """The entry's row with its quality, or with the reason that it has none. `samples` gets a DMPT's routes."""
    settings = opener.settings
    try:
        scorer = opener.open(entry)
    except Exception as error:  # noqa: BLE001  # reason() raises what is none
        return failed_row(entry, reason(error))
    try:
        row = replace(row_of(entry, scorer), versions=opener.versions(entry))
        text = texts.of(scorer)
        if text is None:
            return row
        resume = opener.work / "scores" if settings.resume is not None else None
        try:
            row = replace(
                row, quality=quality.evaluate(scorer, text, *texts.windows, settings.protocol, resume=resume, keep=True)
            )
            if row.is_dmpt and (sample := routes.sample(scorer, text.ids)):
                samples.append(sample)
        except Exception as error:  # noqa: BLE001
            return replace(row, failure=reason(error))
        return row
    finally:
        scorer.close()


def reason(error: Exception) -> str:
    """What a row says of its failure; an error that is not meant for people is a bug of ours, and raised again."""
    if hasattr(error, "exit_code") or isinstance(error, OSError) or is_out_of_memory(error):
        return str(error) or type(error).__name__
    raise error


def timed(
    entries: Sequence[Entry],
    rows: list[Row],
    opener: Opener,
    text: list[int] | None,
    context: int,
    at_the_end: bool,
) -> list[Row]:
    """The rows with their speed, or the reason that they have none. at_the_end: also decode where the context ends."""
    settings = opener.settings
    targets = [opener.target(e) for e, row in zip(entries, rows, strict=True) if row.size_bytes]
    prompt, gen = fit(settings.prompt, settings.gen, context)
    depth = [prompt, context - gen] if at_the_end and context - gen > prompt else None
    failures: dict[str, str] = {}
    found = speed.measure(
        [t for t in targets if t], prompt, gen, settings.repetitions, settings.threads, settings.device, text,
        depth=depth, failures=failures,
    )  # fmt: skip
    by_name = {result.name: result for result in found}
    return [replace(r, speed=by_name.get(r.name), failure=r.failure or failures.get(r.name)) for r in rows]
