"""Perplexity and accuracy of a model on a text, optionally compared with a base model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmpt_export.extras import require
from dmpt_export.requests.scoring import Windows, check_places, check_scored
from dmpt_export.requests.sources import is_exported
from training.errors import OptionError
from training.progress import say

if TYPE_CHECKING:
    from benchmarks.quality.by_domain import DomainQuality
    from benchmarks.quality.perplexity import Quality
    from benchmarks.quality.scorer import Scorer


@dataclass(frozen=True)
class Evaluated:
    """The measurements: of the whole text, or by domain."""

    quality: Quality | None
    domains: dict[str, DomainQuality]
    several_heads: bool  # whether a path of the model has several heads


@dataclass(frozen=True)
class EvaluateRequest:
    model: str  # ONNX folder, DMPT or quantized folder, or GPT-2 folder or hub id
    data: tuple[str, ...] = ()  # text files or hub datasets, scored as one text
    domain: tuple[str, ...] = ()  # or NAME=FILE: texts with the names of their domains, each scored alone
    text_field: str = "text"  # text field of JSONL, Parquet and datasets
    protocol: str = "stride-concat"  # of benchmarks.quality.protocols
    max_length: int | None = None  # window length in tokens; None: 1024, or the context if that is less
    stride: int | None = None  # predictions scored in each window; None: the protocol's
    mode: str = "gate_hard"  # path mode
    fast_k: int | None = None  # candidates of the anchor head; 0: none, every head in full; None: the checkpoint's
    base: str | None = None  # another model, to measure KL(base || model)
    base_cache: str | None = None  # folder for the base's log-probs, 2 bytes each
    resume: str | None = None  # folder for the state of the evaluation
    batch: int = 1  # windows that a checkpoint runs together
    threads: int | None = None  # CPU threads; None: all available to this process
    device: str = "cpu"  # cpu or cuda

    @property
    def models(self) -> list[str]:
        return [self.model, *([self.base] if self.base else [])]

    def check(self) -> None:
        """Raise OptionError for fields that exclude each other, then InputError for unusable files."""
        from training.text.named import files_of

        if bool(self.data) == bool(self.domain):
            raise OptionError("give {data} FILE, or {domain} NAME=FILE for each domain of text")
        if self.domain and self.base:
            raise OptionError("{base} is for {data}: leave it out with {domain}")
        if self.base_cache and not self.base:
            raise OptionError("{base_cache} caches the log-probs of {base}: give {base} too")
        require(*(self.device if is_exported(source) else "train" for source in self.models))
        windows = Windows(self.protocol, self.max_length, self.stride)
        windows.check()
        check_places(
            [*self.data, *files_of(self.domain)], [folder for folder in (self.base_cache, self.resume) if folder]
        )
        check_scored(self.model, windows, self.mode, self.fast_k)
        if self.base is not None:
            check_scored(self.base, windows)

    def run(self) -> Evaluated:
        if not all(is_exported(source) for source in self.models):
            say("loading PyTorch")
        from benchmarks.quality.divergence import Base, check_base
        from benchmarks.quality.open_scorer import open_scorer
        from benchmarks.quality.perplexity import Resume, evaluate, read_text

        with contextlib.ExitStack() as stack:
            scorer = self.open(self.mode)
            stack.callback(scorer.close)
            if self.domain:
                return Evaluated(None, self.by_domain(scorer), several_heads(scorer))
            text = read_text(scorer, self.data, self.text_field, self.protocol)
            base = None
            if self.base is not None:
                base = Base(open_scorer(self.base, self.threads, self.device), self.base_cache)
                stack.callback(base.close)
                theirs = read_text(base.scorer, self.data, self.text_field, self.protocol)
                check_base(scorer, base.scorer, text.ids, theirs.ids)
            resume = Resume(self.resume) if self.resume else None
            quality = evaluate(scorer, text, self.max_length, self.stride, self.protocol, self.batch, base, resume)
        return Evaluated(quality, {}, several_heads(scorer))

    def open(self, mode: str) -> Scorer:
        from benchmarks.quality.open_scorer import open_scorer

        return open_scorer(self.model, self.threads, self.device, mode, fast_k=self.fast_k)

    def by_domain(self, scorer: Scorer) -> dict[str, DomainQuality]:
        from benchmarks.quality.by_domain import by_domain
        from benchmarks.quality.perplexity import Resume, evaluate, read_text
        from benchmarks.quality.scorer import domains_of_source
        from training.text.named import named_texts

        resume = Resume(self.resume, keep=True) if self.resume else None  # those of finished domains, too

        def measure(one: Scorer, files: Sequence[str]) -> Quality:
            text = read_text(one, files, self.text_field, self.protocol)
            return evaluate(one, text, self.max_length, self.stride, self.protocol, self.batch, resume=resume)

        # the paths of an export cannot be forced
        alone = None if is_exported(self.model) else lambda leaf: self.open(f"{leaf}_only")
        return by_domain(scorer, alone, domains_of_source(self.model), named_texts(self.domain), measure)


def several_heads(scorer: Scorer) -> bool:
    return any(len(heads) > 1 for heads in scorer.head_allocation.values())
