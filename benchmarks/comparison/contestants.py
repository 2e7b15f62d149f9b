"""The models of a comparison, of any kind, each opened for scoring and timing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison.model_result import Row
from benchmarks.peers import registry
from benchmarks.quality.open_scorer import context_of, open_scorer
from benchmarks.quality.peer_scorer import PeerScorer
from benchmarks.quality.progress import files_digest
from benchmarks.quality.protocols import STRIDE_CONCAT
from benchmarks.quality.scorer import DMPT, Scorer, family_of, kind_of, record_of_source, scheme_of_source
from benchmarks.speed import timing
from benchmarks.speed.processes import WorkerFailed
from runtime.errors import ModelError
from runtime.manifest_file import read_manifest
from training.errors import InputError
from training.text.sources import FIELD
from training.text.tokenizer import load_tokenizer
from training.text.windows import check_vocabulary

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Entry:
    """A model to be compared."""

    name: str
    path: str
    family: str | None = None  # determines the colour in the picture; None: read from the model
    scheme: str | None = None  # None: read from the model
    control: bool = False  # plain GPT-2 that the DMPT rows are compared with
    peer: str | None = None  # another runtime (benchmarks.peers.registry) that runs the GPT-2 at `path`, in `scheme`

    @property
    def kind(self) -> str:
        return "peer" if self.peer else kind_of(self.path)


@dataclass(frozen=True)
class Settings:
    """How all models of a comparison are measured."""

    threads: int | None = None  # None: all available to this process
    device: str = "cpu"
    protocol: str = STRIDE_CONCAT  # of benchmarks.quality.protocols, as are max_length and stride
    max_length: int | None = None
    stride: int | None = None
    text_field: str = FIELD  # text field of JSON and tables
    prompt: int = 128  # tokens fed at once, tokens decoded, rounds: see benchmarks.speed.timing.measure
    gen: int = 64
    repetitions: int = 5
    resume: str | Path | None = None  # folder for converted peers and scores, kept after the run
    pythons: Mapping[str, str] = field(default_factory=dict)  # peer -> Python interpreter that has it


@dataclass
class Opener:
    """Opens models; converted peers are stored in `work`."""

    work: Path
    settings: Settings = Settings()
    digests: dict[str, str] = field(default_factory=dict)  # path -> digest of its weights

    def open(self, entry: Entry) -> Scorer:
        """Raises InputError, or WorkerFailed for a peer, when the model cannot be opened."""
        if entry.peer is None:
            s = self.settings
            return open_scorer(entry.path, s.threads, s.device, name=entry.name)
        from training.checkpoints.files import resolve

        target = self.target(entry)
        assert target
        assert entry.scheme
        source, threads = resolve(entry.path), self.settings.threads
        return PeerScorer(target, entry.scheme, source, self.gpt2(entry), threads)

    def gpt2(self, entry: Entry) -> Path:
        return registry.gpt2_folder(entry.path, self.folder(entry, "gpt2"))

    def folder(self, entry: Entry, kind: str) -> Path:
        """One folder per kind and weights, so that several schemes of a source convert it only once, and changed
        weights are converted again."""
        from training.checkpoints.files import resolve

        if entry.path not in self.digests:
            self.digests[entry.path] = files_digest(resolve(entry.path))[:16]
        return self.work / kind / self.digests[entry.path]

    def target(self, entry: Entry) -> timing.Target | None:
        """The target to time; None for checkpoints, which have no speed. Converts a peer, once."""
        if entry.kind == "onnx":
            return timing.target(entry.name, entry.path)
        if entry.peer is None or entry.scheme is None:
            return None
        out, python = self.folder(entry, f"{entry.peer}-{entry.scheme}"), self.settings.pythons.get(entry.peer)
        return registry.prepare(entry.peer, entry.scheme, self.gpt2(entry), out, python, entry.name)

    def versions(self, entry: Entry) -> dict[str, str]:
        """Versions of a peer's packages and its Python; {} for models of this project."""
        if entry.peer is None:
            return {}
        known: dict[str, str] = registry.read_facts(self.folder(entry, f"{entry.peer}-{entry.scheme}"))["versions"]
        return known


def row_of(entry: Entry, scorer: Scorer) -> Row:
    """The row of an opened model, still without figures."""
    return Row(
        name=entry.name,
        path=entry.path,
        kind=entry.kind,
        is_dmpt=scorer.family == DMPT,
        family=entry.family or ("GPT-2 fine-tuned" if entry.control else scorer.family),
        scheme=entry.scheme or scorer.scheme,
        control=entry.control,
        parameters=scorer.parameters,
        parameters_touched_per_token=scorer.parameters_touched_per_token,
        size_bytes=scorer.size_bytes,
        training=None if entry.peer else record_of_source(scorer.folder),
        graph=graph_of(entry),
        shape=shape_of(entry),
    )


def graph_of(entry: Entry) -> str | None:
    """sha256 of an exported graph, which does not depend on the values of its weights; None for other models."""
    if entry.kind != "onnx":
        return None
    manifest = read_manifest(Path(entry.path))
    return next(file.sha256 for file in manifest.files if file.name == manifest.model)


def failed_row(entry: Entry, failure: str) -> Row:
    """The row of a model that could not be opened; family and scheme come from its description if that is readable."""
    family, scheme = (entry.peer, entry.scheme) if entry.peer else described(entry.path)
    is_dmpt = family == DMPT
    return Row(
        entry.name, entry.path, entry.kind, is_dmpt, entry.family or family or "?", entry.scheme or scheme or "?",
        entry.control, 0, 0, 0, failure=failure,
    )  # fmt: skip


def described(source: str | Path) -> tuple[str, str] | tuple[None, None]:
    """Family and scheme from a model's manifest or config.json; None if these cannot be read."""
    try:
        shape = onnx_shape(source) if kind_of(source) == "onnx" else checkpoint_shape(source)
        scheme = scheme_of_source(source)
    except (InputError, ModelError, OSError):
        return None, None
    return family_of(shape["paths"], shape["heads"]), scheme


def shape_of(entry: Entry) -> dict[str, int]:
    """Paths, heads per path, fast_k (0: off): factors that speed may depend on. {} for peers."""
    if entry.peer:
        return {}
    return onnx_shape(entry.path) if entry.kind == "onnx" else checkpoint_shape(entry.path)


def onnx_shape(folder: str | Path) -> dict[str, int]:
    manifest = read_manifest(Path(folder))
    heads = max(len(own) for own in manifest.head_allocation.values())
    return {"paths": len(manifest.leaves), "heads": heads, "fast_k": manifest.raw["config"].get("fast_k") or 0}


def checkpoint_shape(source: str | Path) -> dict[str, int]:
    from training.checkpoints.checkpoint import read_config

    config = read_config(source)
    heads = max(len(own) for own in config.head_allocation.values())
    return {"paths": len(config.leaves), "heads": heads, "fast_k": config.fast_k or 0}


def peers_of(
    source: str | None, pythons: Mapping[str, str], asked: Collection[str] = ()
) -> tuple[list[Entry], list[str]]:
    """Every installed peer in each of its schemes on the GPT-2 at `source`, and a line on how to install the others.

    source: None for no rows. asked: peers that already have rows, which report missing packages themselves.
    """
    found, absent = [], []
    for name, peer in registry.PEERS.items():
        try:
            lacking = registry.missing(name, pythons.get(name))
        except WorkerFailed as error:
            raise InputError(str(error)) from error
        if lacking and name not in asked:
            absent.append(f"{name} ({peer.install})")
        elif source and not lacking:
            found += [Entry(f"{name} {scheme}", source, scheme=scheme, peer=name) for scheme in peer.schemes]
    return found, [f"Peers that are not installed: {'; '.join(absent)}."] if absent else []


def check(entries: list[Entry], out: str | Path | None) -> int:
    """The smallest context of the models. Raises InputError, before long work, for models that cannot be compared."""
    if not entries:
        raise InputError("nothing to compare: give one or more models")
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several models have the name {', '.join(twice)}: give them names with NAME=PATH")
    for entry in entries:
        if entry.peer:
            registry.check_plain(entry.path)
        elif entry.control and described(entry.path)[0] == DMPT:
            raise InputError(f"{entry.name} is a DMPT: a control must be plain GPT-2")
        check_tokenizer(entry.path)
    if out is not None:
        from training.checkpoints.places import check_replaceable

        check_replaceable(Path(out), "comparison")
    return min(context_of(entry.path) for entry in entries)


def check_tokenizer(source: str | Path) -> None:
    """Raise InputError for a model without a tokenizer, or with one that does not fit."""
    if kind_of(source) == "onnx":
        folder, vocab_size = Path(source), read_manifest(Path(source)).config.vocab_size
    else:
        from training.checkpoints.checkpoint import read_config
        from training.checkpoints.files import resolve

        folder, vocab_size = resolve(source), read_config(source).vocab_size
    check_vocabulary(load_tokenizer(folder), vocab_size, source)
