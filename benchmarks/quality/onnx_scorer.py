"""An exported folder as a benchmarks.quality.scorer.Scorer: ONNX Runtime without torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.scorer import Float, Ints, Piece, Window, family_of, onnx_size, scheme_of, tokenizer_of
from training.errors import InputError
from training.model.shape import GATE_HARD

if TYPE_CHECKING:
    pass


class OnnxScorer:
    """An exported folder run by ONNX Runtime."""

    def __init__(self, folder: Path, threads: int | None, device: str, mode: str, name: str) -> None:
        if mode != GATE_HARD:
            raise InputError(f"{folder} only supports {GATE_HARD}, not '{mode}': evaluate its checkpoint instead")
        import runtime

        self.model = runtime.load(folder, device=device, threads=threads)
        manifest = self.model.manifest
        self.name, self.folder, self.mode, self.device = name, folder, mode, device
        self.context, self.vocab_size = manifest.config.n_positions, manifest.config.vocab_size
        self.leaves = list(manifest.leaves)
        self.head_allocation: Mapping[str, Sequence[int]] = manifest.head_allocation
        n_heads = 1 + max(j for heads in self.head_allocation.values() for j in heads)
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
