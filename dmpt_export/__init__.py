"""Train, quantize and export Dynamic Multiple Path Transformers and GPT-2, and run them without torch.

    load                  an exported folder, ready to run (runtime.load); needs no torch
    load_prompt           a prompt that was read and saved (runtime.load_prompt)
    Model                 what it returns (runtime.model.Model)
    DMPTOnnxForCausalLM   an exported folder as a Transformers model
    quantize, export, evaluate, evaluate_domains, compare    as the commands (dmpt_export.api)

Importing the package imports nothing heavy: each name is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmpt_export.api import compare, evaluate, evaluate_domains, export, quantize
    from dmpt_export.transformers_model import DMPTOnnxForCausalLM
    from runtime import load, load_prompt
    from runtime.model import Model

__version__ = "0.1.0"
__all__ = ["DMPTOnnxForCausalLM", "Model", "compare", "evaluate", "evaluate_domains", "export", "load", "load_prompt",
           "quantize"]  # fmt: skip
MODULES = {
    "load": "runtime",
    "load_prompt": "runtime",
    "Model": "runtime.model",
    "DMPTOnnxForCausalLM": "dmpt_export.transformers_model",
} | dict.fromkeys(("quantize", "export", "evaluate", "evaluate_domains", "compare"), "dmpt_export.api")


def __getattr__(name: str) -> Any:
    """A public name, when it is asked for. Raises MissingExtra where a package it needs is not installed."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "DMPTOnnxForCausalLM":
        from dmpt_export.extras import require

        require("train", "cpu")
    return getattr(import_module(MODULES[name]), name)
