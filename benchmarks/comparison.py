"""Several models side by side: what each weighs, how well it predicts, how fast it runs."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine as computer
from benchmarks import quality, speed
from benchmarks.reading import reading
from benchmarks.row import HEADERS, Row, cells
from benchmarks.scorer import Scorer, context_of, kind_of, open_scorer
from benchmarks.table import markdown
from training.errors import InputError

if TYPE_CHECKING:
    from training.model import DMPTForCausalLM

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """A model to be compared."""

    name: str
    path: str
    family: str | None = None  # what a colour stands for in the picture; None: told from the model
    scheme: str | None = None  # None: told from the model
    control: bool = False  # plain GPT-2 fine-tuned on the same tokens as the DMPT rows


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

    def to_json(self) -> dict[str, Any]:
        keys = ("reading", "data", "command", "seeds", "created", "machine", "versions")
        return {
            "format": "dmpt-comparison",
            "format_version": FORMAT_VERSION,
            "rows": [row.to_json() for row in self.rows],
            **{key: getattr(self, key) for key in keys},
        }

    def as_markdown(self) -> str:
        picture = "![size against perplexity](comparison.png)\n" if self.has_picture else ""
        return f"# Comparison\n\n{self.table()}\n\n{self.reading}\n\n{self.conditions()}\n\n{picture}"

    @property
    def has_picture(self) -> bool:
        """Whether there is a perplexity to draw."""
        return any(row.quality for row in self.rows)

    def write(self, folder: Path) -> None:
        """comparison.json, comparison.md and, when perplexities are known, comparison.png, into `folder`."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
        (folder / "comparison.md").write_text(self.as_markdown(), encoding="utf-8")
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
) -> Comparison:
    """Measure every entry on the same text and in one interleaved schedule; write the result to `out` if given.

    data: text files to score; none leaves quality out. prompt, gen, repetitions: see benchmarks.speed.measure,
    the prompt is the beginning of the text. seeds: recorded as they are, with the prompt's. Raises InputError
    for unusable entries before anything long begins.
    """
    context = check(entries, out)
    max_length, stride = quality.choose_windows(context, max_length, stride)  # the same windows for all
    rows: list[Row] = []
    texts: dict[str, NDArray[np.int32]] = {}
    for entry in entries:
        scorer = open_scorer(entry.path, threads, device, name=entry.name, dequantize=dequantize)
        try:
            ids = tokens(scorer, data, texts) if data else None
            measured = None if ids is None else quality.evaluate(scorer, ids, max_length, stride)
            rows.append(row_of(entry, scorer, measured))
        finally:
            scorer.close()
    # Several tokenizers have no prompt in common: random ids then.
    text = next(iter(texts.values())).tolist() if len(texts) == 1 else None
    result = Comparison(
        rows=add_speed(rows, text, prompt, gen, repetitions, threads, device),
        data=[str(path) for path in data],
        command=list(command or computer.command_line()),
        seeds={"prompt": speed.SEED, **(seeds or {})},
    )
    if out is not None:
        result.save(out)
    return result


def check(entries: Sequence[Entry], out: str | Path | None) -> int:
    """Refuse what cannot be compared before anything long begins; the smallest context among the models."""
    if not entries:
        raise InputError("nothing to compare: give one or more models")
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several models are called {', '.join(twice)}: tell them apart with NAME=PATH")
    if out is not None:
        from training.checkpoint import check_replaceable

        check_replaceable(Path(out), "comparison")
    return min(context_of(entry.path) for entry in entries)


def tokens(scorer: Scorer, data: Sequence[str | Path], texts: dict[str, NDArray[np.int32]]) -> NDArray[np.int32]:
    """The text's ids, tokenised once per tokenizer; `texts` keeps them."""
    key = hashlib.sha256(f"{scorer.end_of_text} {scorer.tokenizer.to_str()}".encode()).hexdigest()
    if key not in texts:
        texts[key] = quality.read_tokens(scorer, data)
    return texts[key]


def row_of(entry: Entry, scorer: Scorer, measured: quality.Quality | None) -> Row:
    family = entry.family or ("GPT-2 fine-tuned" if entry.control else scorer.family)
    return Row(
        name=entry.name,
        path=entry.path,
        kind=kind_of(entry.path),
        is_dmpt=scorer.family == "DMPT",
        family=family,
        scheme=entry.scheme or scorer.scheme,
        control=entry.control,
        parameters=scorer.parameters,
        parameters_touched_per_token=scorer.parameters_touched_per_token,
        size_bytes=scorer.size_bytes,
        quality=measured,
    )


def add_speed(
    rows: Sequence[Row],
    text: list[int] | None,
    prompt: int,
    gen: int,
    repetitions: int,
    threads: int | None,
    device: str,
) -> list[Row]:
    """The rows with those of ONNX folders timed, in one interleaved schedule."""
    targets = [speed.target(row.name, row.path) for row in rows if row.kind == "onnx"]
    if not targets:
        return list(rows)
    timed = speed.measure(targets, prompt, gen, repetitions, threads, device, text)
    by_name = {result.name: result for result in timed}
    return [replace(row, speed=by_name.get(row.name)) for row in rows]
