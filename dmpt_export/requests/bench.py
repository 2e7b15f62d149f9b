"""Time exported models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpt_export.extras import require
from training.errors import OptionError
from training.progress import say

if TYPE_CHECKING:
    from benchmarks.speed.cases import Workload
    from benchmarks.speed.results import Speed
    from benchmarks.speed.timing import Target

PROMPT, GEN = 512, 128  # defaults


@dataclass(frozen=True)
class Benched:
    """The measurements."""

    rounds: list[list[Speed]]  # for each number of threads, one per model
    nodes: dict[str, dict[str, float]]  # model -> node type -> milliseconds per decoded token; {} without a profile
    rows: list[dict[str, Any]]  # for JSON: one object per model and round


@dataclass(frozen=True)
class BenchRequest:
    models: tuple[str, ...]  # ONNX folders, each also as NAME=FOLDER
    threads: tuple[int, ...] | None = None  # CPU threads, timed in turn; None: all available to this process
    prompt: tuple[int, ...] | None = None  # tokens fed at once; None: 512, or as many as the smallest context allows
    gen: tuple[int, ...] | None = None  # tokens decoded one by one; None: 128, or as above
    depth: tuple[int, ...] | None = None  # tokens before the decoded ones; None: the first prompt
    repetitions: int = 5  # measured rounds
    loads: int = 3  # fresh processes whose load time is measured
    profile: bool = False  # also measure the time of a decoding step by node type
    evict: bool = False  # also time decoding with the weights evicted from the CPU's caches
    report: str | None = None  # HTML file
    device: str = "cpu"  # cpu or cuda
    overwrite: bool = False  # an existing report is replaced

    def workload(self) -> Workload:
        from benchmarks.speed.cases import Workload

        return Workload(
            self.prompt or PROMPT,
            self.gen or GEN,
            self.depth,
            self.prompt is not None,
            self.gen is not None,
            self.evict,
        )

    def check(self) -> list[Target]:
        """Raise InputError for anything but exported models, sizes beyond a context, and an unwritable report.

        Returns the targets to time.
        """
        if self.evict and self.device != "cpu":
            raise OptionError("{evict} is for {device} cpu")
        require(self.device)
        from benchmarks.quality.open_scorer import context_of
        from benchmarks.quality.scorer import named
        from benchmarks.speed.timing import target
        from training.checkpoints.places import check_new_file

        targets = [target(name, path) for name, path in named(self.models)]
        self.workload().cases(min(context_of(t.path) for t in targets))
        if self.report is not None:
            check_new_file(Path(self.report), self.overwrite, *(t.path for t in targets))
        return targets

    def run(self, targets: list[Target], show: Callable[[Benched], None]) -> Benched:
        """Time the targets that check() returned. `show` gets the result before the report is written, so that a full
        disk does not lose it."""
        from benchmarks.speed.profiling import profile
        from benchmarks.speed.timing import Schedule, measure

        say("loading each model in fresh processes")
        schedule = Schedule(self.repetitions, self.loads, cold=1, roof=self.device == "cpu")
        rounds = [
            measure(targets, self.workload(), schedule, threads, self.device) for threads in self.threads or (None,)
        ]
        nodes: dict[str, dict[str, float]] = {}
        if self.profile:
            nodes = profile(targets, rounds[0][0].first("tg").case, rounds[0][0].threads, self.device)
        result = Benched(rounds, nodes, [row for results in rounds for row in rows_of(targets, results, nodes)])
        show(result)
        if self.report is not None:
            write_report(Path(self.report), result)
        return result


def rows_of(
    targets: Sequence[Target], results: Sequence[Speed], nodes: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """One object per model of a round: its figures, with the factors that they may depend on."""
    from benchmarks.comparison.contestants import onnx_shape
    from benchmarks.quality.scorer import scheme_of
    from runtime.manifest_file import read_manifest

    base = results[0] if len(results) > 1 else None
    return [
        {
            "model": t.path,
            "name": t.name,
            "scheme": scheme_of(read_manifest(Path(t.path)).raw),
            "shape": onnx_shape(t.path),
            "node_ms": nodes.get(t.name),
            **found.to_json(base),
        }
        for t, found in zip(targets, results, strict=True)
    ]


def write_report(file: Path, result: Benched) -> None:
    """Write the curves as one HTML file, in one step; without curves it says so."""
    from benchmarks.report.bench import page
    from training.checkpoints.atomic import atomic_file

    with atomic_file(file) as partial:
        partial.write_text(page(result.rows, result.nodes), encoding="utf-8")
