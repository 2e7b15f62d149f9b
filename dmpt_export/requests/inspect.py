"""The parts of a model, and its paths on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpt_export.extras import require
from dmpt_export.requests.scoring import check_places
from dmpt_export.requests.sources import check_model, is_exported
from training.errors import OptionError
from training.progress import say

if TYPE_CHECKING:
    from benchmarks.quality.by_domain import DomainQuality
    from benchmarks.quality.perplexity import Quality
    from benchmarks.quality.scorer import Scorer


@dataclass(frozen=True)
class Inspected:
    summary: dict[str, Any]  # dmpt_export.inspect.summary.summarise
    usage: dict[str, Any] | None  # benchmarks.quality.path_usage, of the text
    domains: dict[str, DomainQuality]  # of the domains' texts


@dataclass(frozen=True)
class InspectRequest:
    model: str  # ONNX folder, DMPT or quantized folder, or GPT-2 folder or hub id
    data: str | None = None  # text to measure path usage and head weights on
    domain: tuple[str, ...] = ()  # NAME=FILE: texts with the names of their domains
    picture: str | None = None  # SVG file to draw the domains to
    overwrite: bool = False  # an existing picture is replaced

    def check(self) -> None:
        """Raise OptionError for fields that exclude each other, then InputError for unusable files."""
        from training.checkpoints.places import check_new_file
        from training.text.named import files_of

        if self.picture is not None and not self.domain:
            raise OptionError("{picture} draws domains: give {domain} NAME=FILE for each")
        files = [*files_of(self.domain), *([] if self.data is None else [self.data])]
        exported = is_exported(self.model)
        require(*([] if exported else ["train"]), *(["cpu"] if exported and files else []))
        check_places(files, [])
        if not exported:
            check_model(self.model)
        if self.picture is not None:
            check_new_file(Path(self.picture), self.overwrite, self.model, *files)

    def run(self) -> Inspected:
        if not is_exported(self.model):
            say("loading PyTorch")
        from dmpt_export.inspect.summary import summarise

        summary = summarise(self.model)
        usage = None if self.data is None else self.follow(self.data)
        domains = self.compare_domains() if self.domain else {}
        return Inspected(summary, usage, domains)

    def follow(self, text: str) -> dict[str, Any]:
        from benchmarks.quality.open_scorer import open_scorer
        from benchmarks.quality.path_usage import usage

        scorer = open_scorer(self.model)
        try:
            return usage(scorer, first_ids(scorer, text))
        finally:
            scorer.close()

    def compare_domains(self) -> dict[str, DomainQuality]:
        """As `eval --domain`, on the first tokens of each domain's text."""
        from benchmarks.quality.by_domain import by_domain
        from benchmarks.quality.open_scorer import open_scorer
        from benchmarks.quality.path_usage import MOST
        from benchmarks.quality.perplexity import evaluate
        from benchmarks.quality.scorer import domains_of_source
        from training.text.named import named_texts

        def measure(one: Scorer, files: Sequence[str]) -> Quality:
            import numpy as np

            return evaluate(one, np.concatenate([first_ids(one, file) for file in files])[:MOST])

        scorer = open_scorer(self.model)
        alone = None if is_exported(self.model) else lambda leaf: open_scorer(self.model, mode=f"{leaf}_only")
        try:
            return by_domain(scorer, alone, domains_of_source(self.model), named_texts(self.domain), measure)
        finally:
            scorer.close()


def first_ids(scorer: Scorer, text: str) -> Any:
    """The first tokens of a text: int32 [n], at most benchmarks.quality.path_usage.MOST."""
    from benchmarks.quality.path_usage import MOST
    from training.text.windows import check_vocabulary, first_tokens

    check_vocabulary(scorer.tokenizer, scorer.vocab_size, scorer.folder)
    return first_tokens(Path(text), scorer.tokenizer, scorer.end_of_text, MOST)


def draw(file: str, found: Inspected) -> None:
    """Write the picture of the domains, in one step."""
    from benchmarks.report.domains import picture
    from training.checkpoints.atomic import atomic_file

    with atomic_file(Path(file)) as tmp:
        tmp.write_text(picture(found.summary["name"], found.domains), encoding="utf-8")
