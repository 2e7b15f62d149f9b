"""Damage of every group and candidate, measured once and remembered on disk, so that a killed run goes on.

The file is keyed by the model's weights, the calibration text and how much of it is used; another target with the
same candidates measures nothing again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from quant.calibration import Calibration, Inputs, observe
from quant.damage import Damage
from quant.plan import Group, Option
from quant.quantize import TensorReport, quantize_tensor
from quant.rules import Rule
from quant.schemes import SCHEMES
from quant.tensor import QuantizedTensor, Weight
from training.checkpoint import atomic_file, model_from_tensors
from training.config import DMPTConfig
from training.model import DMPTForCausalLM

DAMAGE_TOKENS = 1024  # of the calibration text that damage is measured on
LOGITS = 2**28  # log-probs kept at once at most (1 GB): fewer tokens for a larger vocabulary
FORMAT = 1  # of the file
Floats = dict[str, NDArray[np.float32]]


class Measurements:
    """Quantized tensors of a float model, and what each costs.

    arrays: the float checkpoint by name; read, not changed. cache: folder of remembered damages.
    """

    def __init__(
        self, config: DMPTConfig, arrays: Floats, calibration: Calibration, cache: Path, tokens: int = DAMAGE_TOKENS
    ) -> None:
        self.arrays, self.calibration = arrays, calibration
        self.model = model_from_tensors(config, {name: torch.from_numpy(array) for name, array in arrays.items()})
        self.damage = damage_on(self.model, calibration, tokens)
        self.path = cache / f"damage-{self._key(config)}.json"
        self.known: dict[str, Any] = self._remembered()
        self.stored: dict[tuple[str, str], tuple[QuantizedTensor, TensorReport]] = {}  # by tensor and how(rule)

    def options(self, groups: Sequence[Group], candidates: Sequence[Sequence[Rule]]) -> list[list[Option]]:
        """Every candidate of every group, measured alone, with a progress bar and an estimate of the time left."""
        wanted = {
            (group, rule) for group, rules in zip(groups, candidates, strict=True) for rule in rules
            if str(rule) not in self.known
        }  # fmt: skip
        with tqdm(total=len(wanted), desc="measure damage", unit=" groups", leave=False, disable=None) as bar:
            for group, rule, tensors in self._quantized(wanted):
                bar.set_postfix_str(str(rule))
                kl = self.damage.of({name: tensor.dequantize() for name, tensor in tensors.items()})
                size = sum(tensor.nbytes for tensor in tensors.values())
                self.known[str(rule)] = asdict(Option(str(rule).removeprefix(f"{group.pattern}="), size, kl))
                self._remember()
                bar.update()
        return [[Option(**self.known[str(rule)]) for rule in rules] for rules in candidates]

    def quantized(
        self, groups: Sequence[Group], rules: Sequence[Rule]
    ) -> dict[str, tuple[QuantizedTensor, TensorReport]]:
        """All tensors of the groups, each quantized by its group's rule, with what that did."""
        pairs = set(zip(groups, rules, strict=True))
        missing = {pair for pair in pairs if any((name, how(pair[1])) not in self.stored for name in pair[0].tensors)}
        for _ in self._quantized(missing):
            pass
        return {name: self.stored[name, how(rule)] for group, rule in pairs for name in group.tensors}

    def joint(self, groups: Sequence[Group], rules: Sequence[Rule]) -> float:
        """KL of the whole plan."""
        quantized = self.quantized(groups, rules)
        return self.damage.of({name: tensor.dequantize() for name, (tensor, _) in quantized.items()})

    def _quantized(self, wanted: set[tuple[Group, Rule]]) -> Iterator[tuple[Group, Rule, dict[str, QuantizedTensor]]]:
        """Quantize the wanted groups: calibrated ones as their block is observed, then the others."""
        calibrated = {pair for pair in wanted if SCHEMES[pair[1].scheme].calibrated}
        names = {name for group, _ in calibrated for name in group.tensors}
        seen = observe(self.model, self.calibration.windows, names) if names else iter(())
        pending = set(calibrated)
        for inputs in chain(seen, [None]):
            ready = {pair for pair in pending if inputs is None or any(name in inputs for name in pair[0].tensors)}
            pending -= ready
            for group, rule in sorted(ready, key=str):
                yield group, rule, self._quantize(group, rule, inputs or {})
        for group, rule in sorted(wanted - calibrated, key=str):
            yield group, rule, self._quantize(group, rule, {})

    def _quantize(self, group: Group, rule: Rule, inputs: Mapping[str, Inputs]) -> dict[str, QuantizedTensor]:
        out = {}
        for name in group.tensors:
            if (name, how(rule)) not in self.stored:
                self.stored[name, how(rule)] = quantize_tensor(name, self.arrays[name], rule, inputs.get(name))
            out[name], _ = self.stored[name, how(rule)]
        return out

    # --- what is remembered -----------------------------------------------------------------------

    def _key(self, config: DMPTConfig) -> str:
        digest = hashlib.sha256(f"damage-{FORMAT} {config.fast_k} {config.head_topk} {config.head_allocation}".encode())
        for name, array in self.arrays.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).data)
        for part in (self.calibration.windows, self.damage.windows):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:32]

    def _remembered(self) -> dict[str, Any]:
        """Damages by rule; {} where none are remembered, or the file is of no use."""
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            return {rule: asdict(Option(**option)) for rule, option in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _remember(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.known, indent=1), encoding="utf-8")


def damage_on(model: DMPTForCausalLM, calibration: Calibration, tokens: int = DAMAGE_TOKENS) -> Damage:
    """What measures damage on the beginning of a calibration text: whole windows, about as many tokens as asked."""
    rows = min(tokens, LOGITS // model.config.vocab_size)
    windows = calibration.windows
    return Damage(model, windows[: max(1, rows // windows.shape[1])])


def with_damage(
    model: DMPTForCausalLM, weights: Mapping[str, Weight], reports: Sequence[TensorReport], calibration: Calibration
) -> list[TensorReport]:
    """The reports with the KL of each quantized tensor alone, all others float; a progress bar on a terminal."""
    damage, out = damage_on(model, calibration), []
    for report in tqdm(reports, desc="measure damage", unit=" tensors", leave=False, disable=None):
        weight = weights[report.name]
        if isinstance(weight, QuantizedTensor):
            report = replace(report, kl=damage.of({report.name: weight.dequantize()}))
        out.append(report)
    return out


def how(rule: Rule) -> str:
    """A rule without its pattern."""
    return str(rule).removeprefix(f"{rule.pattern}=")
