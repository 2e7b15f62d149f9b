"""The scoring interface of all models: token ids in, the deployed distribution of the next tokens out.

ONNX folder (dmpt_manifest.json)               -> benchmarks.quality.onnx_scorer: no torch imported
DMPT checkpoint, GPT-2 folder or hub id        -> benchmarks.quality.checkpoint_scorer, through load_model
quantized folder (config.json, "quantization") -> the same, through quant.checkpoint.dequantized_model
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.manifest_file import MANIFEST_NAME, read_manifest
from training.checkpoints.record import Record, recorded
from training.errors import InputError
from training.model.domains import Served, check_domains, is_served

if TYPE_CHECKING:
    from tokenizers import Tokenizer


DMPT = "DMPT"  # the family of models with several paths or heads

Float = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A model's predictions after some consecutive tokens of a window. The next piece may overwrite the arrays."""

    log_probs: Float  # [n, V]
    routes: Ints | None  # [n] leaf indices; None for path modes that do not choose one
    head_weights: Float | None = None  # [n, heads] by head number, 0 for other leaves' heads; None: not available


Window = tuple[NDArray[np.integer], int]  # ids [S], and the number of last positions to score


class Scorer(Protocol):
    """A model that returns log-probabilities."""

    name: str
    folder: Path  # with the tokenizer
    context: int  # longest sequence, in tokens
    vocab_size: int
    leaves: list[str]
    family: str  # "DMPT" or "GPT-2"
    scheme: str  # how the weights are stored: "fp32", "int8", ...
    parameters: int
    parameters_touched_per_token: int
    size_bytes: int  # graph and weights, without tokenizer
    head_allocation: Mapping[str, Sequence[int]]  # leaf -> its heads
    mode: str  # path mode: "gate_hard" as deployed, or another of training.model.dmpt's
    end_of_text: int
    tokenizer: Tokenizer

    def score(self, ids: NDArray[np.integer], last: int) -> tuple[Float, Ints | None]:
        """Log-probs [last, V] of the tokens after the last `last` of `ids` [S], and the leaf index of each row.

        Routes are None for path modes that do not choose one leaf per token.
        """
        ...

    def close(self) -> None: ...


def kind_of(source: str | Path) -> str:
    """ "onnx", "quantized" or "float" (also for hub ids and anything that is not a model), without importing torch."""
    folder = Path(source)
    if (folder / MANIFEST_NAME).is_file():
        return "onnx"
    return "float" if config_json(folder).get("quantization") is None else "quantized"


def pieces(scorer: Scorer, windows: Sequence[Window]) -> Iterator[Piece]:
    """The predictions of `scorer` for windows, in order, a few rows at a time if it supports that.

    A window's pieces are consecutive, and none holds rows of two windows. A scorer without its own `pieces` scores
    whole windows.
    """
    if hasattr(scorer, "pieces"):
        yield from scorer.pieces(windows)
        return
    for ids, last in windows:
        yield Piece(*scorer.score(ids, last))


def named(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of models given as PATH or NAME=PATH; the name of a PATH is its last part, or the whole path if
    several models would otherwise have the same name.

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
        raise InputError(f"several models have the name {', '.join(twice)}: give them names with NAME=PATH")
    return found


def config_json(folder: Path) -> dict[str, Any]:
    """config.json unchanged; {} when missing or unreadable, which the loaders report better."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def family_of(n_leaves: int, n_heads: int) -> str:
    return DMPT if n_leaves > 1 or n_heads > 1 else "GPT-2"


def scheme_of_source(source: str | Path) -> str:
    """How a model stores its weights, from its manifest or config.json."""
    if kind_of(source) == "onnx":
        return scheme_of(read_manifest(Path(source)).raw)
    found: dict[str, str] = config_json(Path(source)).get("quantization") or {"scheme": "fp32"}
    return found["scheme"]


def record_of_source(source: str | Path) -> Record | None:
    """What a model was trained on, from its manifest or config.json; None where it is not recorded."""
    if kind_of(source) == "onnx":
        return recorded(read_manifest(Path(source)).raw)
    return recorded(config_json(Path(source)))


def domains_of_source(source: str | Path) -> dict[str, Served]:
    """What serves each domain that a model was taught, from its manifest or config.json. Raises InputError for a
    damaged manifest."""
    if kind_of(source) != "onnx":
        return dict(config_json(Path(source)).get("domains") or {})  # the loaders have checked it
    manifest = read_manifest(Path(source))
    found = manifest.raw.get("domains") or {}
    if not isinstance(found, dict) or not all(map(is_served, found.values())):
        raise InputError(f"{source}: the manifest's domains are damaged; export it again")
    check_domains(found, manifest.head_allocation)
    return found


def scheme_of(manifest: dict[str, Any]) -> str:
    """How an exported model stores its weights; float weights are named by their width."""
    scheme = (manifest.get("quantization") or {}).get("scheme", "float")
    return {"float32": "fp32", "float16": "fp16"}[manifest["activation_dtype"]] if scheme == "float" else scheme


def tokenizer_of(folder: Path, config: dict[str, Any]) -> tuple[Tokenizer, int]:
    from training.text.tokenizer import load_tokenizer
    from training.text.windows import end_of_text_id

    tokenizer = load_tokenizer(folder)
    return tokenizer, end_of_text_id(tokenizer, config)


def onnx_size(folder: str | Path) -> int:
    """Bytes of the graph and its external weights: model.onnx, model.onnx.data."""
    folder = Path(folder)
    return sum(file.stat().st_size for file in folder.glob(f"{read_manifest(folder).model}*"))


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files: safetensors, or else PyTorch's own format as in old GPT-2 folders."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
