"""Command line and ONNX export of Dynamic Multiple Path Transformers. Importing the package imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmpt_export.transformers_model import DMPTOnnxForCausalLM

__version__ = "0.1.0"
__all__ = ["DMPTOnnxForCausalLM"]


def __getattr__(name: str) -> Any:
    """Import `DMPTOnnxForCausalLM` on first use. Raises MissingExtra when a package it needs is not installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dmpt_export.extras import require

    require("train", "cpu")
    from dmpt_export import transformers_model

    return getattr(transformers_model, name)
