"""One door to every kind of model: token ids in, the deployed distribution of the next tokens out.

ONNX folder (dmpt_manifest.json)               -> OnnxScorer: runtime, no torch imported
DMPT checkpoint, GPT-2 folder or hub id        -> benchmarks.torch_scorer: training.checkpoint.load_model
quantized folder (config.json, "quantization") -> the same, when the caller says how to dequantize it
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import MANIFEST_NAME, read_manifest
from training.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from training.model import DMPTForCausalLM

DMPT = "DMPT"  # the family of models with several paths or heads
GATE_HARD, RANDOM = "gate_hard", "random"  # training.model's names; repeated because that module imports torch

Float = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """What a model says after some consecutive tokens of a window. The next piece may overwrite the arrays."""

    log_probs: Float  # [n, V]
    routes: Ints | None  # [n] leaf indices; None for path modes that choose none
    head_weights: Float | None = None  # [n, heads] by head number, 0 for those of other leaves; None: not told


Window = tuple[NDArray[np.integer], int]  # ids [S], and after how many of the last of them something is asked


class Scorer(Protocol):
    """A model that can be asked for log-probabilities."""

    name: str
    folder: Path  # where the tokenizer lives
    context: int  # longest sequence, in tokens
    vocab_size: int
    leaves: list[str]
    family: str  # "DMPT" or "GPT-2"
    scheme: str  # how the weights are stored: "fp32", "int8", ...
    parameters: int
    parameters_touched_per_token: int
    size_bytes: int  # graph and weights, without tokenizer
    head_allocation: Mapping[str, Sequence[int]]  # leaf -> its heads
    mode: str  # path mode: "gate_hard" as deployed, or another of training.model's
    end_of_text: int
    tokenizer: Tokenizer

    def score(self, ids: NDArray[np.integer], last: int) -> tuple[Float, Ints | None]:
        """Log-probs [last, V] of the tokens after the last `last` of `ids` [S], and the leaf index of each row.

        Routes are None for path modes that do not choose one leaf per token.
        """
        ...

    def close(self) -> None: ...


def kind_of(source: str | Path) -> str:
    """ "onnx", "quantized" or "float" (which includes hub ids and whatever is no model), without importing torch."""
    folder = Path(source)
    if (folder / MANIFEST_NAME).is_file():
        return "onnx"
    return "float" if config_json(folder).get("quantization") is None else "quantized"


def pieces(scorer: Scorer, windows: Sequence[Window]) -> Iterator[Piece]:
    """What `scorer` says of windows, row after row in their order, a few rows at a time where it can.

    A window's pieces follow each other, and none holds rows of two windows. A scorer without `pieces` of its own is
    asked for whole windows.
    """
    if hasattr(scorer, "pieces"):
        yield from scorer.pieces(windows)
        return
    for ids, last in windows:
        yield Piece(*scorer.score(ids, last))


def named(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of models given as PATH or NAME=PATH; a path's name is its last part, or all of it where
    several models would have the same name.

    >>> named(["base=out/gpt2", "out/dmpt", "a/int8", "b/int8"])
    [('base', 'out/gpt2'), ('dmpt', 'out/dmpt'), ('a/int8', 'a/int8'), ('b/int8', 'b/int8')]
    """
    pairs = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        given = bool(equals and name and path) and not Path(argument).exists()
        pairs.append((name, path) if given else (Path(argument).name or argument, argument))
    names = [name for name, _ in pairs]
    found = [(path if names.count(name) > 1 and Path(path).name == name else name, path) for name, path in pairs]
    names = [name for name, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several models are called {', '.join(twice)}: tell them apart with NAME=PATH")
    return found


def context_of(source: str | Path) -> int:
    """The longest sequence, in tokens, from the model's description alone. Raises as open_scorer for no model."""
    if kind_of(source) == "onnx":
        return read_manifest(Path(source)).config.n_positions
    from training import checkpoint

    context: int = checkpoint.read_config(source).n_positions
    return context


def config_json(folder: Path) -> dict[str, Any]:
    """config.json as it stands; {} when absent or unreadable, which the loaders report better."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def open_scorer(
    source: str | Path,
    threads: int | None = None,
    device: str = "cpu",
    mode: str = GATE_HARD,
    name: str | None = None,
    dequantize: Callable[[str | Path], DMPTForCausalLM] | None = None,
    fast_k: int | None = None,
) -> Scorer:
    """Load `source`, whatever kind of model it is.

    dequantize: loads a quantized folder as a torch model. This package does not know the quantized format;
    the command line passes quant.checkpoint.dequantized_model.
    fast_k: candidates of the anchor head instead of the checkpoint's; 0: every head is scored fully.
    Raises InputError (or the runtime's own errors, same exit code) for what cannot be loaded, for a quantized
    folder without `dequantize`, and for a fast_k that cannot be: an ONNX folder has its own built in.
    """
    name = name or Path(source).name or str(source)
    kind = kind_of(source)
    if kind == "onnx" and fast_k is not None:
        raise InputError(
            f"{source} was exported with its fast-k built in: leave --fast-k out, or export its checkpoint again "
            f"with dmpt-export onnx --fast-k {fast_k}"
        )
    if kind == "onnx":
        return OnnxScorer(Path(source), threads, device, mode, name)
    if kind == "quantized" and dequantize is None:
        raise InputError(f"{source} is a quantized checkpoint: export it first: dmpt-export onnx {source} OUT")
    from benchmarks.torch_scorer import TorchScorer
    from training import checkpoint

    check_device(device)
    model = dequantize(source) if kind == "quantized" and dequantize else checkpoint.load_model(source)
    folder = checkpoint.resolve(source)
    scheme = scheme_of_source(folder)
    if fast_k is not None:
        model.config.fast_k = fast_k or None
        model.config.check()
    return TorchScorer(model, folder, threads, device, mode, name, scheme)


def check_device(device: str) -> None:
    """Raise InputError when torch cannot use it."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU that it can use; leave it out, or install torch for CUDA")


class OnnxScorer:
    """An exported folder through ONNX Runtime."""

    def __init__(self, folder: Path, threads: int | None, device: str, mode: str, name: str) -> None:
        if mode != GATE_HARD:
            raise InputError(
                f"{folder} is exported for {GATE_HARD} alone, not '{mode}': evaluate its checkpoint instead"
            )
        import runtime

        self.model = runtime.load(folder, device=device, threads=threads)
        manifest = self.model.manifest
        self.name, self.folder, self.mode, self.device = name, folder, mode, device
        self.context, self.vocab_size = manifest.config.n_positions, manifest.config.vocab_size
        self.leaves = list(manifest.leaves)
        self.head_allocation: Mapping[str, Sequence[int]] = manifest.head_allocation
        n_heads = len({j for heads in self.head_allocation.values() for j in heads})
        self.n_heads = n_heads if manifest.tells_head_weights else 0
        self.family = family_of(len(self.leaves), n_heads)
        self.scheme = scheme_of(manifest.raw)
        self.parameters = manifest.raw["parameters"]["total"]
        self.parameters_touched_per_token = manifest.raw["parameters"]["touched_per_token"]
        self.size_bytes = onnx_size(folder)
        self.tokenizer, self.end_of_text = tokenizer_of(folder, manifest.raw["config"])

    def score(self, ids: NDArray[np.integer], last: int) -> tuple[Float, Ints | None]:
        return self.model.score(ids, last)

    def pieces(self, windows: Sequence[Window]) -> Iterator[Piece]:
        """As the function pieces()."""
        for ids, last in windows:
            yield from itertools.starmap(Piece, self.model.score_pieces(ids, last))

    def close(self) -> None:
        self.model.close()


def family_of(n_leaves: int, n_heads: int) -> str:
    return DMPT if n_leaves > 1 or n_heads > 1 else "GPT-2"


def scheme_of_source(source: str | Path) -> str:
    """How a model stores its weights, from its manifest or config.json."""
    if kind_of(source) == "onnx":
        return scheme_of(read_manifest(Path(source)).raw)
    found: dict[str, str] = config_json(Path(source)).get("quantization") or {"scheme": "fp32"}
    return found["scheme"]


def scheme_of(manifest: dict[str, Any]) -> str:
    """How an exported model stores its weights; float weights are named by their width."""
    scheme = (manifest.get("quantization") or {}).get("scheme", "float")
    return {"float32": "fp32", "float16": "fp16"}[manifest["activation_dtype"]] if scheme == "float" else scheme


def tokenizer_of(folder: Path, config: dict[str, Any]) -> tuple[Tokenizer, int]:
    from training import data

    tokenizer = data.load_tokenizer(folder)
    return tokenizer, data.end_of_text_id(tokenizer, config)


def onnx_size(folder: str | Path) -> int:
    """Bytes of the graph and its external weights: model.onnx, model.onnx.data."""
    folder = Path(folder)
    return sum(file.stat().st_size for file in folder.glob(f"{read_manifest(folder).model}*"))


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files: safetensors, or else PyTorch's own format as old GPT-2 folders have it."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
