"""Damage of every group and candidate, measured once and cached on disk, so that a killed run can continue.

The file is keyed by the model's weights, the calibration text and the amount of it that is used; a new target with
the same candidates needs no new measurements.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quant.calibration import Calibration, Inputs, observe
from quant.deltas import quantize_group
from quant.forms.form import Form
from quant.forms.weights import Weight, form_of
from quant.planning.damage import Damage
from quant.planning.groups import Group
from quant.planning.plan import Option
from quant.quantize import TensorReport, delta_report, quantize_tensor
from quant.rules import LINEAR, Rule, parse_rule
from quant.schemes import SCHEMES
from quant.schemes.low_rank import DELTAS
from training.checkpoints.atomic import atomic_file
from training.checkpoints.checkpoint import model_from_tensors
from training.model.config import DMPTConfig
from training.model.generation import DMPTForCausalLM
from training.progress import Bar

DAMAGE_TOKENS = 1024  # tokens of the calibration text that damage is measured on
LOGITS = 2**28  # at most this many log-probs in memory (1 GB): fewer tokens for a larger vocabulary
FORMAT = 1  # of the cache file
# Fields that change the predictions of the same weights.
DECIDING = ("fast_k", "head_topk", "head_allocation", "shared_anchor", "head_gate_temp", "n_head", "layer_norm_epsilon")
Floats = dict[str, NDArray[np.float32]]


class Measurements:
    """Quantized tensors of a float model, and the damage of each.

    arrays: the float checkpoint by name; read, not changed. cache: folder for measured damages.
    """

    def __init__(
        self, config: DMPTConfig, arrays: Floats, calibration: Calibration, cache: Path, tokens: int = DAMAGE_TOKENS
    ) -> None:
        self.arrays, self.calibration = arrays, calibration
        self.model = model_from_tensors(config, {name: torch.from_numpy(array) for name, array in arrays.items()})
        self.damage = damage_on(self.model, calibration, tokens)
        self.path = cache / f"damage-{self._key(config)}.json"
        self.known: dict[str, Any] = self._remembered()
        self.stored: dict[tuple[str, str], tuple[Form, TensorReport]] = {}  # by tensor and scheme

    def options(self, groups: Sequence[Group], candidates: Sequence[Sequence[str]]) -> list[list[Option]]:
        """Measure every candidate of every group alone, with a progress bar and an estimate of the time left."""
        pairs = [(group, scheme) for group, schemes in zip(groups, candidates, strict=True) for scheme in schemes]
        wanted = [pair for pair in pairs if key(*pair) not in self.known]
        with Bar(total=len(wanted), desc="measure damage", unit=" groups", leave=False) as bar:
            for group, scheme in self._quantized(wanted):
                bar.set_postfix_str(key(group, scheme))
                tensors = (
                    self._deltas(group, scheme, self.arrays)
                    if group.anchor and is_delta(scheme)
                    else {name: self.stored[name, scheme] for name in group.tensors}
                )
                kl = self.damage.of({name: tensor for name, (tensor, _) in tensors.items()})
                size = sum(tensor.nbytes for tensor, _ in tensors.values())
                self.known[key(group, scheme)] = asdict(Option(scheme, size, kl))
                self._remember()
                bar.update()
        return [
            [Option(**self.known[key(group, scheme)]) for scheme in schemes]
            for group, schemes in zip(groups, candidates, strict=True)
        ]

    def quantized(self, groups: Sequence[Group], schemes: Sequence[str]) -> dict[str, tuple[Form, TensorReport]]:
        """All tensors of the groups in their group's scheme, with their reports."""
        pairs = list(zip(groups, schemes, strict=True))
        missing = [
            (group, scheme)
            for group, scheme in pairs
            if not is_delta(scheme) and any((name, scheme) not in self.stored for name in group.tensors)
        ]
        for _ in self._quantized(missing):
            pass
        out = {
            name: self.stored[name, scheme] for group, scheme in pairs if not is_delta(scheme) for name in group.tensors
        }
        anchors = {name: tensor for name, (tensor, _) in out.items()}
        for group, scheme in pairs:
            if is_delta(scheme):
                out |= self._deltas(group, scheme, anchors)
        return out

    def joint(self, groups: Sequence[Group], schemes: Sequence[str]) -> float:
        """KL with all groups quantized at once."""
        quantized = self.quantized(groups, schemes)
        return self.damage.of({name: tensor for name, (tensor, _) in quantized.items()})

    def _quantized(self, wanted: Sequence[tuple[Group, str]]) -> Iterator[tuple[Group, str]]:
        """Quantize the wanted groups and yield each: calibrated ones when their block is observed, then the others.

        Deltas are left out until their anchor is known.
        """
        calibrated = [pair for pair in wanted if not is_delta(pair[1]) and SCHEMES[parse(pair[1]).scheme].calibrated]
        names = {name for group, _ in calibrated for name in group.tensors}
        done = set()
        heads: dict[str, Inputs] = {}  # several may form one group, but are observed one by one
        for seen in observe(self.model, self.calibration.windows, names) if names else ():
            heads |= {name: inputs for name, inputs in seen.items() if not LINEAR.fullmatch(name)}
            known = heads | dict(seen)
            for pair in calibrated:
                if pair not in done and all(name in known for name in pair[0].tensors):
                    done.add(pair)
                    self._quantize(*pair, known)
                    yield pair
        for pair in wanted:
            if pair not in done:
                self._quantize(*pair, {})
                yield pair

    def _quantize(self, group: Group, scheme: str, inputs: Mapping[str, Inputs]) -> None:
        if is_delta(scheme):
            return
        for name in group.tensors:
            if (name, scheme) not in self.stored:
                tensor = quantize_tensor(name, self.arrays[name], parse(scheme), inputs.get(name))
                self.stored[name, scheme] = tensor

    def _deltas(self, group: Group, scheme: str, anchors: Mapping[str, Weight]) -> dict[str, tuple[Form, TensorReport]]:
        assert group.anchor is not None
        heads = {name: self.arrays[name] for name in group.tensors}
        tensors = quantize_group(heads, group.anchor, anchors[group.anchor], parse(scheme))
        return {name: (tensor, delta_report(name, heads[name], tensor)) for name, tensor in tensors.items()}

    # --- cache ------------------------------------------------------------------------------------

    def _key(self, config: DMPTConfig) -> str:
        fields = [getattr(config, name) for name in DECIDING]
        digest = hashlib.sha256(f"damage-{FORMAT} {fields}".encode())
        for name, array in self.arrays.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).data)
        for part in (self.calibration.windows, self.damage.windows):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:32]

    def _remembered(self) -> dict[str, Any]:
        """Cached damages by rule; {} when the file is missing or unusable."""
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            options = {rule: Option(**option) for rule, option in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
        return {rule: asdict(option) for rule, option in options.items() if is_sound(rule, option)}

    def _remember(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.known, indent=1), encoding="utf-8")


def is_sound(rule: str, option: Option) -> bool:
    """Whether a cached option is plausible: the user may have edited or damaged the file."""
    size, kl = option.bytes, option.kl
    return (
        type(size) is int
        and size > 0
        and type(kl) is float
        and 0 <= kl < math.inf
        and rule.endswith(f"={option.scheme}")
    )


def damage_on(model: DMPTForCausalLM, calibration: Calibration, tokens: int = DAMAGE_TOKENS) -> Damage:
    """A Damage on whole windows spread over the calibration text, about `tokens` tokens in all."""
    windows = calibration.windows
    count = max(1, min(tokens, LOGITS // model.config.vocab_size) // windows.shape[1])
    spread = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()
    return Damage(model, windows[spread])


def with_damage(
    model: DMPTForCausalLM, weights: Mapping[str, Weight], reports: Sequence[TensorReport], calibration: Calibration
) -> list[TensorReport]:
    """The reports with the KL of each quantized tensor alone, all others float; a progress bar on a terminal."""
    damage, out = damage_on(model, calibration), []
    for report in Bar(reports, desc="measure damage", unit=" tensors", leave=False):
        form = form_of(weights[report.name])
        if not form.is_float:
            report = replace(report, kl=damage.of({report.name: form}))
        out.append(report)
    return out


def key(group: Group, scheme: str) -> str:
    return f"{group}={scheme}"


def parse(scheme: str) -> Rule:
    """'int4:32' -> a rule for every tensor."""
    return parse_rule(f"*={scheme}")


def is_delta(scheme: str) -> bool:
    return parse(scheme).scheme in DELTAS
