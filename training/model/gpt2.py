"""Hugging Face GPT-2 folders read as a DMPT without splits and with one head. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from training.model.fields import GPT2, TOKENS, tokens
from training.model.shape import ROOT, Shape

# Causal-mask buffers that older folders carry; the mask is the model's own.
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
# What DataParallel, torch.compile and other wrappers put in front of every name.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
LM_HEAD, HEAD, STEM = "lm_head.weight", "heads.0.weight", "transformer."


def gpt2_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a DMPT from a GPT-2's, which training.model.fields has checked."""
    copied = {name: fields[name] for name in GPT2 if name in fields}
    size = copied.get("vocab_size", Shape.vocab_size)
    for name in TOKENS:  # transformers leaves GPT-2's own 50256 in models of any vocabulary
        known = [token for token in tokens(fields.get(name, getattr(Shape, name))) if token < size]
        copied[name] = known if len(known) > 1 else known[0] if known else None
    return {**copied, "splits": [], "head_allocation": {ROOT: [0]}}


@dataclass(frozen=True)
class Names:
    """How a GPT-2's file names its tensors."""

    wrapper: str  # such as "module.", in front of all names
    stem: str  # "transformer." or nothing

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """As the names of a file tell.

        >>> Names.of(["_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"])
        Names(wrapper='_orig_mod.', stem='transformer.')
        """
        known = sorted(names)
        wrapper = WRAPPERS.match(known[0]) if known else None
        start = wrapper[0] if wrapper and all(name.startswith(wrapper[0]) for name in known) else ""
        inner = [name.removeprefix(start) for name in known]
        return cls(start, STEM if any(name.startswith(STEM) for name in inner) else "")

    def contract(self, name: str) -> str | None:
        """The contract's name of a file's tensor; None for a buffer.

        >>> Names("module.", "").contract("module.h.0.ln_1.weight")
        'transformer.h.0.ln_1.weight'
        """
        name = name.removeprefix(self.wrapper)
        if name == LM_HEAD:
            return HEAD
        full = name if name.startswith(STEM) else f"{STEM}{name}"
        return None if BUFFERS.fullmatch(full) else full

    def file(self, name: str) -> str:
        """The file's name of a tensor, the inverse of contract(): for messages."""
        if name == HEAD:
            return f"{self.wrapper}{LM_HEAD}"
        return f"{self.wrapper}{self.stem}{name.removeprefix(STEM)}"
