"""Quality by domain of text and by path: what each domain loses on every path, and how many tokens go where taught."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.perplexity import Quality
from benchmarks.quality.scorer import Scorer
from training.errors import InputError
from training.model.domains import Served, leaves_of


@dataclass(frozen=True)
class DomainQuality:
    """Scores of one domain's text."""

    quality: Quality  # with the path mode that was asked for
    paths: dict[str, float]  # leaf -> perplexity of the whole text on that path alone; {} where it cannot be had
    serving: list[str]  # leaves that training taught the domain; [] where it taught none, or there is only one

    @property
    def as_taught(self) -> float | None:
        """Share of the tokens that take a leaf that serves the domain; None without such leaves or without routes."""
        shares = self.quality.route_shares
        return sum(shares[leaf] for leaf in self.serving) if self.serving and shares else None

    def to_json(self) -> dict[str, Any]:
        own = {"path_alone_perplexity": self.paths, "serving": self.serving, "as_taught": self.as_taught}
        return {**self.quality.to_json(), **own}


def by_domain(
    scorer: Scorer,
    alone: Callable[[str], Scorer] | None,
    served: Mapping[str, Served],
    texts: Mapping[str, Sequence[str]],
    measure: Callable[[Scorer, Sequence[str]], Quality],
) -> dict[str, DomainQuality]:
    """Measure the text of each domain, in order: name -> files.

    alone: opens the model with one leaf for all tokens; None where that cannot be had. served: what training taught
    to serve domains. measure: scores files.
    """
    several = len(scorer.leaves) > 1  # else there is nothing to choose
    own = {name: served[name] for name in texts if name in served and several}
    serving = {name: leaves_of(own[name], scorer.head_allocation) if name in own else [] for name in texts}

    def measured(one: Scorer, name: str) -> Quality:
        try:
            return measure(one, texts[name])
        except InputError as error:
            raise error.after(f"domain '{name}': ") from error

    found = {name: measured(scorer, name) for name in texts}
    paths: dict[str, dict[str, float]] = {name: {} for name in texts}
    if alone is not None and several:
        for leaf in scorer.leaves:
            one = alone(leaf)
            try:
                for name in texts:
                    paths[name][leaf] = measured(one, name).perplexity
            finally:
                one.close()
    return {name: DomainQuality(found[name], paths[name], serving[name]) for name in texts}
