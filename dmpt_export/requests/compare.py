"""Compare models: size, quality, speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpt_export.extras import require
from dmpt_export.requests.scoring import Windows, check_places, check_scored
from dmpt_export.requests.sources import check_model, is_exported
from training.errors import OptionError, usage
from training.progress import say

if TYPE_CHECKING:
    from benchmarks.comparison.contestants import Entry, Settings
    from benchmarks.comparison.result import Comparison


@dataclass(frozen=True)
class Found:
    """Everything that check() read."""

    entries: list[Entry]  # the given models
    pythons: dict[str, str]  # peer -> Python interpreter that has it
    growth: list[dict[str, Any]]  # models in the files of `bench --json`


@dataclass(frozen=True)
class CompareRequest:
    models: tuple[str, ...]  # folders, hub ids, PEER:SCHEME@GPT2, each also as NAME=MODEL
    data: tuple[str, ...] = ()  # text files or hub datasets, scored as one text; none: no quality
    text_field: str = "text"  # text field of JSONL, Parquet and datasets
    protocol: str = "stride-concat"  # of benchmarks.quality.protocols
    out: str | None = None  # folder
    control: tuple[str, ...] = ()  # names of plain GPT-2 rows that the DMPT rows are compared with
    peers: str | None = None  # GPT-2 folder or hub id that every installed peer runs
    peer_python: tuple[str, ...] = ()  # PEER=PYTHON, the interpreter that has a peer
    growth: tuple[str, ...] = ()  # files of `bench --json`
    resume: str | None = None  # folder for converted peers and scores
    max_length: int | None = None  # window length in tokens; None: 1024, or the smallest context if that is less
    stride: int | None = None  # predictions scored in each window; None: the protocol's
    prompt: int = 128  # tokens fed at once
    gen: int = 64  # tokens decoded after them
    repetitions: int = 5  # measured rounds
    threads: int | None = None  # CPU threads; None: all available to this process
    device: str = "cpu"  # cpu or cuda
    overwrite: bool = False  # an earlier result in `out` is replaced

    @property
    def needs_torch(self) -> bool:
        return not all(self.exported) or self.peers is not None or self.out is not None

    @property
    def exported(self) -> list[bool]:
        return [is_exported(model.partition("=")[2] or model) for model in self.models]

    def check(self) -> Found:
        """Raise OptionError for unknown names, then InputError for unusable files."""
        wanted = {
            self.device: any(self.exported),
            "train": self.needs_torch,
            "bench": bool(self.out and self.data),
        }
        require(*(extra for extra, needed in wanted.items() if needed))
        from training.checkpoints.places import check_inputs, check_new

        pythons, entries = self.interpreters(), self.entries()
        windows = Windows(self.protocol, self.max_length, self.stride)
        windows.check()
        growth = [row for file in self.growth for row in bench_rows(file)]
        if self.out is not None:
            check_new(Path(self.out), "comparison", self.overwrite)
            read = (*(entry.path for entry in entries), self.peers, *self.data, self.resume, *self.growth)
            check_inputs(Path(self.out), *read)
        check_places(self.data, [self.resume] if self.resume else [])
        sources = list(dict.fromkeys([*(entry.path for entry in entries), *([self.peers] if self.peers else [])]))
        for source in sources:  # before tokenizers: a foreign folder's needs Transformers, which takes seconds
            if not is_exported(source):
                check_model(source)
        for source in sources:
            check_scored(source, windows)
        return Found(entries, pythons, growth)

    def run(self, found: Found, show: Callable[[Comparison], None]) -> Comparison:
        """Compare the models that check() found. `show` gets the result before it is written, so that a full disk does
        not lose it."""
        if self.needs_torch:
            say("loading PyTorch")
        from benchmarks.comparison.comparison import compare
        from training.checkpoints.lock import working_in

        entries, absent = with_peers(found, self.peers)
        settings = self.settings(found.pythons)
        with working_in(self.out, "compare", beside=True) if self.out is not None else nullcontext():
            return compare(entries, self.data, self.out, settings, absent=absent, growth=found.growth, show=show)

    def settings(self, pythons: dict[str, str]) -> Settings:
        from benchmarks.comparison.contestants import Settings

        return Settings(
            self.threads, self.device, self.protocol, self.max_length, self.stride, self.text_field, self.prompt,
            self.gen, self.repetitions, self.resume, pythons,
        )  # fmt: skip

    def entries(self) -> list[Entry]:
        """The given models. Raises OptionError for a control that is not one of them."""
        from benchmarks.comparison.contestants import Entry
        from benchmarks.peers.registry import parse
        from benchmarks.quality.scorer import named

        entries = []
        for name, path in named(self.models):
            with usage():
                peer = parse(path)
            if peer:
                kind, scheme, source = peer
                called = f"{kind} {scheme}" if name in (path, Path(path).name) else name
                entries.append(Entry(called, source, scheme=scheme, peer=kind))
            else:
                entries.append(Entry(name, path, control=name in self.control))
        if unknown := set(self.control) - {entry.name for entry in entries if entry.peer is None}:
            names = ", ".join(entry.name for entry in entries if entry.peer is None)
            raise OptionError("{control} {} is not among the models: {}", ", ".join(sorted(unknown)), names)
        return entries

    def interpreters(self) -> dict[str, str]:
        """PEER=PYTHON ... as a dict. Raises OptionError for any other form."""
        from benchmarks.peers.registry import PEERS

        out = {}
        for pair in self.peer_python:
            name, equals, python = pair.partition("=")
            if not (equals and python) or name not in PEERS:
                raise OptionError("{peer_python} {}: give PEER=PYTHON with one of {}", pair, ", ".join(PEERS))
            out[name] = python
        return out


def with_peers(named: Found, source: str | None) -> tuple[list[Entry], list[str]]:
    """The entries, then all installed peers on the GPT-2 `source`; and, where any peer is asked for, a line about those
    that are not installed."""
    from benchmarks.comparison.contestants import peers_of

    asked = {entry.peer for entry in named.entries if entry.peer}
    if not source and not asked:
        return named.entries, []
    found, absent = peers_of(source, named.pythons, asked)
    known = {(entry.peer, entry.scheme, entry.path) for entry in named.entries}
    new = (entry for entry in found if (entry.peer, entry.scheme, entry.path) not in known)
    return [*named.entries, *new], absent


def bench_rows(file: str) -> list[dict[str, Any]]:
    """The models in a file written by `bench --json`. Raises OptionError for any other file."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = found.get("models", [found])
        if not all({"name", "threads", "scheme", "shape", "tests"} <= row.keys() for row in rows):
            raise ValueError
    except (OSError, ValueError, AttributeError) as error:
        raise OptionError("{growth} {} is not the output of `dmpt-export bench --json`", file) from error
    return rows
