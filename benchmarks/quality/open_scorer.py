"""Open a model of any kind for scoring; also checks that need no open model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.onnx_scorer import OnnxScorer
from benchmarks.quality.scorer import Scorer, kind_of, scheme_of_source
from runtime.manifest_file import read_manifest
from training.errors import FieldError
from training.model.shape import GATE_HARD


def context_of(source: str | Path) -> int:
    """The longest sequence, in tokens, from the model's description alone. Raises the same errors as open_scorer."""
    if kind_of(source) == "onnx":
        return read_manifest(Path(source)).config.n_positions
    from training.checkpoints.checkpoint import read_config

    context: int = read_config(source).n_positions
    return context


def open_scorer(
    source: str | Path,
    threads: int | None = None,
    device: str = "cpu",
    mode: str = GATE_HARD,
    name: str | None = None,
    fast_k: int | None = None,
) -> Scorer:
    """Load `source`, a model of any kind.

    fast_k: candidates of the anchor head instead of the checkpoint's; 0: every head is scored fully.
    Raises InputError (or the runtime's own errors, same exit code) for a model that cannot be loaded, and for a fast_k
    that cannot be set: in an ONNX folder it is fixed.
    """
    name = name or Path(source).name or str(source)
    kind = kind_of(source)
    if kind == "onnx" and fast_k is not None:
        raise FieldError(
            "{} has a fixed fast-k from its export: leave {fast_k} out, or export its checkpoint again with "
            "dmpt-export onnx --fast-k {}",
            source, fast_k,
        )  # fmt: skip
    if kind == "onnx":
        return OnnxScorer(Path(source), threads, device, mode, name)
    from benchmarks.quality.checkpoint_scorer import TorchScorer
    from quant.checkpoint import dequantized_model
    from training.checkpoints.checkpoint import load_model
    from training.checkpoints.files import resolve

    check_device(device)
    model = dequantized_model(source) if kind == "quantized" else load_model(source)
    folder = resolve(source)
    scheme = scheme_of_source(folder)
    if fast_k is not None:
        model.config.fast_k = fast_k or None
        model.config.check()
    return TorchScorer(model, folder, threads, device, mode, name, scheme)


def check_device(device: str) -> None:
    """Raise InputError when torch cannot use the device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise FieldError("{device} cuda: torch finds no usable GPU; leave it out, or install torch for CUDA")
