"""Read Hugging Face GPT-2 folders as a DMPT without splits and with one head. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from training.model.fields import GPT2, TOKENS, tokens
from training.model.shape import ROOT, Shape

# Causal-mask buffers of older folders, which are not read: the model makes its own mask.
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
# Prefixes that DataParallel, torch.compile and other wrappers add to every name.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
LM_HEAD, HEAD, STEM = "lm_head.weight", "heads.0.weight", "transformer."


def gpt2_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a DMPT from those of a GPT-2, already checked by training.model.fields."""
    copied = {name: fields[name] for name in GPT2 if name in fields}
    size = copied.get("vocab_size", Shape.vocab_size)
    for name in TOKENS:  # transformers leaves GPT-2's 50256 in models of any vocabulary
        known = [token for token in tokens(fields.get(name, getattr(Shape, name))) if token < size]
        copied[name] = known if len(known) > 1 else known[0] if known else None
    return {**copied, "splits": [], "head_allocation": {ROOT: [0]}}


@dataclass(frozen=True)
class Names:
    """The naming scheme of a GPT-2's tensor files."""

    wrapper: str  # such as "module.", in front of all names
    stem: str  # "transformer." or nothing

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Infer the scheme from the tensor names of a file.

        >>> Names.of(["_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"])
        Names(wrapper='_orig_mod.', stem='transformer.')
        """
        known = sorted(names)
        wrapper = WRAPPERS.match(known[0]) if known else None
        start = wrapper[0] if wrapper and all(name.startswith(wrapper[0]) for name in known) else ""
        inner = [name.removeprefix(start) for name in known]
        return cls(start, STEM if any(name.startswith(STEM) for name in inner) else "")

    def contract(self, name: str) -> str | None:
        """This project's name for a tensor of the file; None for a buffer.

        >>> Names("module.", "").contract("module.h.0.ln_1.weight")
        'transformer.h.0.ln_1.weight'
        """
        name = name.removeprefix(self.wrapper)
        if name == LM_HEAD:
            return HEAD
        full = name if name.startswith(STEM) else f"{STEM}{name}"
        return None if BUFFERS.fullmatch(full) else full

    def file(self, name: str) -> str:
        """The file's name for a tensor, the inverse of contract(), for messages."""
        if name == HEAD:
            return f"{self.wrapper}{LM_HEAD}"
        return f"{self.wrapper}{self.stem}{name.removeprefix(STEM)}"
