"""A peer as a benchmarks.quality.scorer.Scorer: the same tokens and windows as other models, in its own process."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import registry
from benchmarks.quality.scorer import Float, Ints, tokenizer_of
from benchmarks.speed.processes import Worker, WorkerFailed
from benchmarks.speed.timing import Target
from training.model.shape import GATE_HARD

MASK = re.compile(r"\.attn\.(bias|masked_bias)$")  # causal masks in GPT-2's own files, not parameters


class PeerScorer:
    """A loaded peer. Log-probs are passed through a file, [last, V] of one window."""

    def __init__(self, target: Target, scheme: str, source: Path, weights: Path, threads: int | None) -> None:
        """source: folder with the tokenizer; weights: the GPT-2 folder that was converted. Raises WorkerFailed."""
        from safetensors import safe_open

        self.name, self.folder, self.scheme = target.name, source, scheme
        self.peer = (target.adapter, scheme, json.dumps(registry.read_facts(Path(target.path))["versions"]))
        self.mode, self.family, self.leaves = GATE_HARD, target.name.split()[0], ["root"]
        self.head_allocation: Mapping[str, Sequence[int]] = {"root": [0]}
        config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        with safe_open(weights / "model.safetensors", "np") as file:
            weights_of = [name for name in file.keys() if not MASK.search(name)]  # noqa: SIM118
            self.parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in weights_of)
        # All but the positions, plus one row each of positions and embedding, as training.model.config counts.
        self.parameters_touched_per_token = self.parameters - (config["n_positions"] - 2) * config["n_embd"]
        self.size_bytes = target.size_bytes
        self.tokenizer, self.end_of_text = tokenizer_of(source, config)
        self.scratch = tempfile.TemporaryDirectory(prefix="dmpt-peer-")
        self.worker: Worker = Worker(target.name, target.python)
        try:
            facts = registry.load(self.worker, target, threads)
        except BaseException:
            self.close()
            raise
        self.context, self.vocab_size = facts["context"], facts["vocab_size"]

    def score(self, ids: NDArray[np.integer], last: int) -> tuple[Float, Ints | None]:
        out = Path(self.scratch.name) / "scores.npy"
        self.worker.ask(do="score", ids=[int(i) for i in ids], last=last, out=str(out))
        found: Float = np.load(out, allow_pickle=False)
        if found.shape != (last, self.vocab_size):
            raise WorkerFailed(f"{self.name} returns scores {list(found.shape)}, not {[last, self.vocab_size]}", 4)
        return found, None

    def close(self) -> None:
        self.worker.close()
        self.scratch.cleanup()
