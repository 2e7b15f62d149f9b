"""What a model was trained on: recorded in config.json (`training`), and in every artefact made of it.

    {"base": "<sha256 of the weights before the first recorded phase>",
     "phases": [{"tokens": 4096000, "steps": 2000, "operations": 1.2e14, "seed": 0, "data": "<crc32>", "length": 256,
                 "best_of": 8192000, "settings": {"lr": 2e-05, "warmup_steps": 1000, ...}}]}

Models that were trained elsewhere have no record until a command of this project trains or initialises from them; then
`base` is the fingerprint of the weights as they came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "training"  # in config.json and the manifest


@dataclass(frozen=True)
class Phase:
    """One training run."""

    tokens: int  # trained on, every pass over the data counted
    steps: int  # optimizer steps
    operations: float  # about: 6 for each parameter that a token's loss computes (forward and backward), per token
    seed: int
    data: str  # crc32 of the token ids
    length: int  # tokens of a training sequence
    # tokens of the whole run, where held-out text chose this step of it; None: not chosen, or not recorded
    best_of: int | None = None
    # learning rates and the like (training.loop.phase); {}: not recorded
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    base: str
    phases: tuple[Phase, ...] = field(default=())

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    @property
    def run_tokens(self) -> int:
        """Tokens of all runs to their end, beyond the steps that held-out text chose."""
        return sum(phase.best_of or phase.tokens for phase in self.phases)

    @property
    def tokens_by_text(self) -> dict[str, int]:
        """Tokens trained on, of each text."""
        sums: dict[str, int] = {}
        for phase in self.phases:
            sums[phase.data] = sums.get(phase.data, 0) + phase.tokens
        return sums

    def with_phase(self, phase: Phase) -> Record:
        return Record(self.base, (*self.phases, phase))

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base, "phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_json(cls, value: Any) -> Record | None:
        """None for nothing, and for what is not such a record."""
        try:
            return cls(str(value["base"]), tuple(Phase(**phase) for phase in value["phases"]))
        except (TypeError, KeyError):
            return None


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names and float32 values of a model's parameters, in name order; a tied one counts once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def record_of(config: Any, parameters: Iterable[tuple[str, Tensor]]) -> Record:
    """A model's record; for one without, that of its weights as they are, with no phases."""
    return Record.from_json(getattr(config, FIELD, None)) or Record(fingerprint(parameters))


def recorded(fields: Mapping[str, Any]) -> Record | None:
    """The record in a config.json or a manifest."""
    return Record.from_json(fields.get(FIELD))
