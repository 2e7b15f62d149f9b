"""The texts of a run: how they are recorded, which domains they have, and their tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.checkpoints.files import cache_folder
from training.checkpoints.folder import read_domain_map
from training.errors import FieldError, InputError, OptionError
from training.model.domains import Served, cluster_names, served_domains
from training.model.shape import Shape
from training.text.named import named_texts
from training.text.sources import FIELD, check_source, is_dataset

if TYPE_CHECKING:
    import numpy as np

    from training.text.domains import Domains

DEFAULT_TEXTS = {"data": ["wikitext-103"], "eval_data": ["wikitext-103:validation"]}  # the original project's


@dataclass(frozen=True)
class Texts:
    """A run's record of its texts, as JSON: data, eval_data, domains, learn_domains, text_field; the rest is kept."""

    about: dict[str, Any]

    @classmethod
    def of(
        cls,
        about: dict[str, Any],
        *,
        data: Sequence[Path],
        eval_data: Sequence[Path],
        domain: Sequence[str],
        learn_domains: int | None,
        text_field: str | None,
    ) -> Texts:
        """`about`, of an earlier run or a new one, with these texts instead of its own."""
        if data or domain:
            about = {key: value for key, value in about.items() if key not in ("data", "domains")}
        if domain:
            about = about | {"domains": {name: absolute(texts) for name, texts in named_texts(domain).items()}}
        given = {
            "data": absolute(data), "eval_data": absolute(eval_data), "learn_domains": learn_domains,
            "text_field": text_field,
        }  # fmt: skip
        return cls(about | {key: value for key, value in given.items() if value})

    def or_default(self) -> Texts:
        """These, or without a training text the default ones. Raises FieldError when those cannot be had."""
        if self.about.get("data") or self.named:
            return self
        try:
            check_source(DEFAULT_TEXTS["data"][0])
        except InputError as error:
            raise FieldError("{data} FILE is missing, and the default is not available: {}", error) from error
        return Texts(self.about | DEFAULT_TEXTS)

    @property
    def named(self) -> dict[str, list[str]]:
        """domain -> files."""
        found: dict[str, list[str]] = self.about.get("domains", {})
        return found

    @property
    def files(self) -> list[str]:
        named = [file for files in self.named.values() for file in files]
        return [*self.about.get("data", ()), *self.about.get("eval_data", ()), *named]

    @property
    def learned(self) -> int:
        """Number of domains to find; 0: none."""
        return int(self.about.get("learn_domains", 0))

    def domains(self) -> tuple[str, ...]:
        """Names of the domains that are taught. Raises OptionError when some are given and others to be learned."""
        if self.learned and self.named:
            raise OptionError("{learn_domains} is for text without domains: leave out {domain} or {learn_domains}")
        if self.learned == 1:
            raise OptionError("{learn_domains} 1: there must be at least 2 domains to tell apart")
        return cluster_names(self.learned) or tuple(self.named)


def absolute(texts: Iterable[str | Path]) -> list[str]:
    """Files by their absolute paths, so that a resumed run finds them from any folder; datasets by their names."""
    return [str(text) if is_dataset(text) else os.path.abspath(text) for text in texts]


def served(names: Sequence[str], domain_map: Path | None, shape: Shape) -> dict[str, Served] | None:
    """The field `domains` of a model that is trained on texts of these domains; None: unchanged.

    domain_map: a JSON file that says so; None: as served_domains.
    Raises OptionError for a map without domains, InputError for one that does not fit them or the model.
    """
    if domain_map is None:
        return served_domains(names, shape.domains, shape.head_allocation)
    if not names:
        raise OptionError("{domain_map} is for text with domains: give {domain} NAME=FILE or {learn_domains}")
    given = read_domain_map(domain_map)
    if missing := [name for name in names if name not in given]:
        raise FieldError("{} does not say what serves '{}'", domain_map, missing[0])
    if unused := [name for name in given if name not in names]:
        raise FieldError("{} names '{}', and no {domain} has text for it", domain_map, unused[0])
    return given


@dataclass(frozen=True)
class Reader:
    """Tokenises texts once; their tokens are cached."""

    texts: Texts
    tokenizer: Path  # folder
    cache_dir: Path | None  # None: the user's cache
    config: Shape  # of the model

    def training(self) -> tuple[np.ndarray, Domains | None]:
        """The tokens to train on, those without a domain first."""
        from training.text.domains import joined

        plain = self.tokens("data")
        if plain is not None and not self.texts.named:
            return plain, None
        named = ((name, self.encoded(files)) for name, files in self.texts.named.items())
        return joined([*([] if plain is None else [(None, plain)]), *named])

    def tokens(self, key: str) -> np.ndarray | None:
        """The tokens of the texts under `key`; None where there are none."""
        files = self.texts.about.get(key)
        return self.encoded(files) if files else None

    def encoded(self, files: Sequence[str]) -> np.ndarray:
        from training.text.tokenizer import load_tokenizer
        from training.text.windows import end_of_text_id, token_cache

        words = load_tokenizer(self.tokenizer)
        eot, field = end_of_text_id(words, self.config), self.texts.about.get("text_field", FIELD)
        return token_cache(files, words, eot, self.cache_dir or cache_folder(), field)
