"""Compare several models: size, quality and speed."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine as this_machine
from benchmarks.comparison.contestants import (
    Entry,
    Opener,
    Settings,
    check,
    failed_row,
    row_of,
)
from benchmarks.comparison.model_result import FIGURES, Row
from benchmarks.comparison.output import save
from benchmarks.comparison.result import Comparison
from benchmarks.quality import perplexity
from benchmarks.quality.protocols import Text, choose_windows, plan
from benchmarks.quality.scorer import Scorer
from benchmarks.report import routes
from benchmarks.speed import timing
from benchmarks.speed.cases import Workload, fit
from runtime.errors import is_out_of_memory
from training.checkpoints.lock import working_in
from training.errors import InputError
from training.progress import tell

SLOW_S = 60.0  # a DMPT checkpoint scored for longer than this gets a hint
FASTER = "hint: a checkpoint runs all paths of each token; an export (`dmpt-export onnx`) runs one and is scored faster"


def compare(
    entries: Sequence[Entry],
    data: Sequence[str | Path] = (),
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    seeds: dict[str, int] | None = None,
    absent: Sequence[str] = (),
    growth: Sequence[dict[str, Any]] = (),
    show: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Measure every entry on the same text and in one interleaved schedule; write the result to `out` if given.

    data: text files to score; without any, quality is left out. The prompt is the start of the text; with `out`,
    decoding is also timed at the end of the context. seeds: recorded unchanged, with the prompt's. absent: lines about
    peers that are not installed. growth: rows of `bench --json` for the growth curves. show: called with the result
    before it is written, so that a full disk does not lose it, and with the rows so far on a KeyboardInterrupt, which
    is raised again. Raises InputError for unusable entries before long work, and for an unusable text; a model that
    fails later becomes a row with the reason.
    """
    settings, context = settings or Settings(), check(list(entries), out)
    # the same windows for all models
    windows = choose_windows(context, settings.max_length, settings.stride, settings.protocol)
    texts = Texts(data, settings, windows)
    rows: list[Row] = []
    result = Comparison(
        rows=rows,
        data=[str(path) for path in data],
        command=list(this_machine.command_line()),
        seeds={"prompt": timing.SEED, **(seeds or {})},
        absent=list(absent),
        growth=list(growth),
    )
    samples: list[dict[str, Any]] = []
    try:
        with workplace(settings) as work:
            opener = Opener(work, settings)
            score_all(entries, opener, texts, rows, samples)
            measured = timed(entries, rows, opener, texts.in_common(), context, at_the_end=out is not None)
    except KeyboardInterrupt:
        if show is not None:
            tell(stopped(len(rows), len(entries), settings.resume))
            if rows:
                show(replace(result, unscored=[entry.name for entry in entries[len(rows) :]]))
        raise
    routes_of = max(samples, key=lambda sample: sample["heads"], default=None)
    result = replace(result, rows=measured, routes=routes_of)
    if show is not None:
        show(result)
    if out is not None:
        save(result, out)
    return result


def stopped(done: int, total: int, resume: str | Path | None) -> str:
    """One line for a comparison that was stopped: what the table has, and how to go on."""
    if done:
        has = f"stopped: the table has {done} of {total} models, and is not written to a folder"
    else:
        has = "stopped before a model was scored"
    if resume is None:
        return f"{has}; with --resume FOLDER scores are kept, and the same command goes on"
    return f"{has}; the same command goes on with the scores in {resume}"


def progress(rows: Sequence[Row], total: int) -> str:
    """One line about the newest row."""
    row = rows[-1]
    found = [f"{name} {figure:.2f}" for name in FIGURES if (figure := row.figure(name)) is not None]
    told = row.failure or ", ".join([*found, f"{row.size_bytes / 1e6:.1f} MB"])
    return f"{len(rows)} of {total}: {row.name}: {told}"


@contextmanager
def workplace(settings: Settings) -> Iterator[Path]:
    """The folder for converted peers and scores: permanent or temporary."""
    if settings.resume is not None:
        with working_in(settings.resume, "compare"):
            yield Path(settings.resume)
        return
    with tempfile.TemporaryDirectory(prefix="dmpt-compare-") as work:
        yield Path(work)


class Texts:
    """The text as tokens, read once per tokenizer."""

    def __init__(self, data: Sequence[str | Path], settings: Settings, windows: tuple[int, int]) -> None:
        self.data, self.settings, self.windows = data, settings, windows
        self.read: dict[str, Text] = {}

    def of(self, scorer: Scorer) -> Text | None:
        """None without a text. Raises InputError for a text that is unreadable or too short."""
        if not self.data:
            return None
        key = hashlib.sha256(f"{scorer.end_of_text} {scorer.tokenizer.to_str()}".encode()).hexdigest()
        if key not in self.read:
            protocol = self.settings.protocol
            self.read[key] = perplexity.read_text(scorer, self.data, self.settings.text_field, protocol)
            try:
                plan(len(self.read[key].ids), *self.windows, protocol)
            except InputError as error:
                raise error.after(f"as {scorer.name} reads it, ") from error
        return self.read[key]

    def in_common(self) -> list[int] | None:
        """The tokens that prompts are taken from; None with several tokenizers, which share no token ids."""
        return next(iter(self.read.values())).ids.tolist() if len(self.read) == 1 else None


def score_all(
    entries: Sequence[Entry], opener: Opener, texts: Texts, rows: list[Row], samples: list[dict[str, Any]]
) -> None:
    """Append a row for each entry, with a line about it; once, a hint when a DMPT checkpoint was slow."""
    hinted = False
    for entry in entries:
        began = time.monotonic()
        rows.append(scored(entry, opener, texts, samples))
        tell(progress(rows, len(entries)))
        slow = time.monotonic() - began > SLOW_S
        if slow and not hinted and rows[-1].is_dmpt and rows[-1].is_checkpoint:
            tell(FASTER)
            hinted = True


def scored(entry: Entry, opener: Opener, texts: Texts, samples: list[dict[str, Any]]) -> Row:
    """The entry's row with its quality, or with the reason why it has none. `samples` gets a DMPT's routes."""
    settings = opener.settings
    try:
        scorer = opener.open(entry)
    except Exception as error:  # noqa: BLE001  # reason() raises bugs again
        return failed_row(entry, reason(error))
    try:
        row = replace(row_of(entry, scorer), versions=opener.versions(entry))
        text = texts.of(scorer)
        if text is None:
            return row
        resume = perplexity.Resume(opener.work / "scores", keep=True) if settings.resume is not None else None
        try:
            row = replace(
                row,
                quality=perplexity.evaluate(scorer, text, *texts.windows, settings.protocol, resume=resume),
            )
            if row.is_dmpt and (sample := routes.sample(scorer, text.ids)):
                samples.append(sample)
        except Exception as error:  # noqa: BLE001
            return replace(row, failure=reason(error))
        return row
    finally:
        scorer.close()


def reason(error: Exception) -> str:
    """The failure text of a row; an error that is not meant for users is a bug and is raised again."""
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
    """The rows with their speed, or the reason why they have none. at_the_end: also decode at the context's end."""
    settings = opener.settings
    targets = [opener.target(e) for e, row in zip(entries, rows, strict=True) if row.size_bytes]
    prompt, gen = fit(settings.prompt, settings.gen, context)
    depth = [prompt, context - gen] if at_the_end and context - gen > prompt else None
    failures: dict[str, str] = {}
    found = timing.measure(
        [t for t in targets if t], Workload(prompt, gen, depth), timing.Schedule(settings.repetitions),
        settings.threads, settings.device, text=text, failures=failures,
    )  # fmt: skip
    by_name = {result.name: result for result in found}
    return [replace(r, speed=by_name.get(r.name), failure=r.failure or failures.get(r.name)) for r in rows]
