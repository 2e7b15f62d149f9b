"""Deployment options of an export. Imports nothing heavy, so that impossible options are reported at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from training.errors import FieldError, OptionError

if TYPE_CHECKING:
    from training.model.shape import Shape

S = TypeVar("S", bound="Shape")
NATIVE, STANDARD = "native", "standard"
LAYOUTS = (NATIVE, STANDARD)
WEB = "web"  # the target


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export."""

    target: str = "cpu"  # "cpu" or "web" (float32 activations), or "cuda" (float16)
    fast_k: int | None = None  # fast_k and head_topk: 0 turns it off, None keeps the checkpoint's
    head_topk: int | None = None
    kv_cache: str = "float"  # of the activations' type, or "int8" (cpu): a quarter of the memory, for a small loss
    opset: int = 21  # version of the standard operators
    draft_vocab: int | None = None  # tokens that draft heads choose among; 0: none; None: 8192, or all if fewer
    atol: float | None = None  # largest allowed difference of a log-prob, instead of the tolerance table's
    layout: str = NATIVE  # inputs and outputs: ours, or "standard", those of optimum, genai and transformers.js

    def check(self, verified: bool, calibrated: bool) -> None:
        """Raise OptionError for options that exclude each other, or that need verification or a text for the cache."""
        if self.layout == STANDARD and self.target == "cuda":
            raise OptionError("{layout} standard is for {target} cpu or web: leave one of them out")
        if self.layout == STANDARD and self.kv_cache == "int8":
            raise OptionError("{layout} standard has float caches, as the programs expect: leave {kv_cache} out")
        if self.layout == STANDARD and self.draft_vocab:
            raise OptionError(
                "{layout} standard has no draft heads, which the programs cannot use: leave {draft_vocab} out"
            )
        if self.target == "cuda" and self.kv_cache == "int8":
            raise OptionError("an int8 KV cache is for {target} cpu or web: leave {kv_cache} out")
        if calibrated and self.kv_cache != "int8":
            raise OptionError("{calib} is for {kv_cache} int8")
        if self.atol is not None and (self.target == "cuda" or not verified):
            raise OptionError("{atol} is for the check of {target} cpu or web: leave out {no_verify} or {atol}")
        if self.atol is not None and not 0 < self.atol < math.inf:
            raise OptionError("{atol} {} must be a number above 0", self.atol)


def deployed(config: S, options: ExportOptions) -> S:
    """`config` as the options change it. Raises InputError when that cannot be exported."""
    fast_k, head_topk, vocabulary = options.fast_k, options.head_topk, options.draft_vocab
    if vocabulary is not None and not config.next_tokens:
        raise FieldError(
            "{draft_vocab} is for a model with draft heads: make one with dmpt-export init --next-tokens N"
        )
    if vocabulary is not None and vocabulary > config.vocab_size:
        raise FieldError("{draft_vocab} {} is larger than the vocabulary of {}", vocabulary, config.vocab_size)
    if vocabulary == 0 or options.layout == STANDARD:
        config.next_tokens = 0
    if fast_k is not None:
        config.fast_k = fast_k or None
    if head_topk is not None:
        config.head_topk = head_topk or None
    config.check()
    config.check_exportable()
    return config
