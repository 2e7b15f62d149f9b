"""Plan bits by measured damage: how to store each group of tensors within a size or a divergence.

    groups -> damage of each candidate alone (KL on calibration text) -> knapsack -> the whole plan, measured jointly

Damages of small changes add up roughly, not exactly. A plan for a size reports its predicted and its measured damage;
a plan for a divergence is made stricter until the measured one holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quant.planning.groups import Group, candidates_of, check_candidates, groups_of
from quant.planning.knapsack import Frontier
from quant.planning.ways_out import ways_out
from quant.rules import DYNAMIC, Rule, parse_rule
from quant.schemes import SCHEMES
from quant.schemes.low_rank import DELTAS
from training.errors import FieldError, InputError

JOINT_TRIES = 8  # plans measured jointly for a target of divergence


@dataclass(frozen=True)
class Option:
    """One way to store a group, measured alone."""

    scheme: str  # as in a rule: "int4:32"
    bytes: int
    kl: float  # nats per token, everything else float32

    def bits(self, weights: int) -> float:
        return 8 * self.bytes / weights


@dataclass(frozen=True)
class Plan:
    """The option chosen for each group, with size and damage. `options`: all measured ones, by group."""

    groups: list[Group]
    options: list[list[Option]]
    chosen: list[int]
    other_bytes: int  # tensors that stay float32
    total_weights: int
    predicted_kl: float
    measured_kl: float
    calibration: dict[str, Any] | None = None  # record of the text that damage was measured on
    smooth: float | None = None  # how strongly activations were balanced first (quant.smooth)
    balanced: tuple[str, ...] = ()  # against these weights

    @property
    def bytes(self) -> int:
        """Stored bytes of all tensors, without the file's header."""
        return self.other_bytes + sum(o[i].bytes for o, i in zip(self.options, self.chosen, strict=True))

    @property
    def bits(self) -> float:
        """Bits per weight of the whole model, including float32 tensors."""
        return 8 * self.bytes / self.total_weights

    def rules(self) -> list[Rule]:
        return [
            parse_rule(f"{pattern}={scheme}")
            for group, scheme in zip(self.groups, self.schemes(), strict=True)
            for pattern in group.patterns
        ]

    def schemes(self) -> list[str]:
        """The chosen scheme of each group, as in a rule."""
        return [options[i].scheme for options, i in zip(self.options, self.chosen, strict=True)]

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "predicted_kl": self.predicted_kl,
            "measured_kl": self.measured_kl,
            "calibration": self.calibration,
            "smooth": self.smooth,
            "balanced": list(self.balanced),
            "rules": [str(rule) for rule in self.rules()],
            "groups": [
                asdict(group) | {"chosen": options[i].scheme, "options": [asdict(option) for option in options]}
                for group, options, i in zip(self.groups, self.options, self.chosen, strict=True)
            ],
        }


@dataclass(frozen=True)
class Target:
    """The limit of a plan: exactly one of the three is set."""

    size: int | None = None  # bytes of the file with all tensors
    kl: float | None = None  # nats per token on the calibration text
    bits: float | None = None  # per weight of the whole model
    fast: bool = False  # within `kl`, as much as possible in the scheme that is fastest, instead of the smallest model

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.size / 1e6:g} MB"
        return f"a KL of {self.kl:g}" if self.kl is not None else f"{self.bits:g} bits per weight"


def check_target(
    shapes: Mapping[str, Sequence[int]], anchors: Mapping[str, set[str]], candidates: str, target: Target
) -> None:
    """Raise InputError for candidates that cannot store some group, and for a size below that of the codes alone.

    Runs before any measurement. make_plan() checks the target exactly."""
    check_candidates(candidates)
    groups = groups_of(shapes, anchors)
    weights = sum(map(math.prod, shapes.values()))
    least = 4 * (weights - sum(group.weights for group in groups))  # bytes of the float32 tensors
    for group in groups:
        rules = [parse_rule(f"*={scheme}") for scheme in candidates_of(group, candidates)]
        bits = min(0 if rule.scheme in DELTAS else SCHEMES[rule.scheme].bits for rule in rules)
        least += group.weights * bits // 8
    size = int(target.bits * weights / 8) if target.bits is not None else target.size
    if size is not None and size < least:
        raise FieldError(
            "no plan fits {}: with {candidates} {} the least is {} MB ({} bits per weight) and scales; {}",
            target, candidates, f"{least / 1e6:.2f}", f"{8 * least / weights:.2f}",
            ways_out(groups, shapes, size, least),
        )  # fmt: skip


def make_plan(
    groups: list[Group], options: list[list[Option]], target: Target, sizes: tuple[int, int, int],
    joint: Callable[[list[int]], float],
    ways: Callable[[float, float], str] = lambda size, least: "give other candidates",
) -> Plan:  # fmt: skip
    """Choose an option for each group. Raises InputError for an impossible target and names the least possible one.

    sizes: bytes of the tensors outside all groups, weights of the whole model, and bytes of the file's header, which
    count towards a target size. joint: the measured KL of a whole choice. ways: says what would fit a size in bytes,
    given the least (quant.planning.ways_out).
    """
    other, weights, header = sizes
    pairs = [[(option.bytes, option.kl) for option in group] for group in options]
    least = other + sum(min(size for size, _ in group) for group in pairs)
    largest = sum(max(size for size, _ in group) for group in pairs)
    size = int(target.bits * weights / 8) if target.bits is not None else target.size and target.size - header

    def plan(chosen: list[int], measured: float) -> Plan:
        predicted = sum(group[i].kl for group, i in zip(options, chosen, strict=True))
        return Plan(groups, options, chosen, other, weights, predicted, measured)

    best = [min(range(len(group)), key=lambda i, group=group: group[i][1]) for group in pairs]  # type: ignore[misc]
    if size is not None and other + _bytes(pairs, best) <= size:
        return plan(best, joint(best))
    if size is not None:
        chosen = Frontier(pairs, min(size - other, largest)).within(size - other) if size >= least else None
        if chosen is None and size >= least:  # the frontier rounds sizes up
            chosen = [min(range(len(group)), key=lambda i: group[i][0]) for group in pairs]
        if chosen is None:
            raise FieldError(
                "no plan fits {}: with {candidates} {} the least is {} MB ({} bits per weight); {}",
                target, tried(options), f"{(least + header) / 1e6:.2f}", f"{8 * least / weights:.2f}",
                ways(size, least),
            )  # fmt: skip
        return plan(chosen, joint(chosen))
    assert target.kl is not None
    costs = [[(slow_bytes(option), option.kl) for option in group] for group in options] if target.fast else pairs
    return plan(*_within_kl(costs, target.kl, joint))


def slow_bytes(option: Option) -> int:
    """What a plan for speed has least of: bytes that no integer product of activations reads."""
    return 0 if parse_rule(f"*={option.scheme}").scheme == DYNAMIC else option.bytes


def tried(options: list[list[Option]]) -> str:
    """All candidates, each once."""
    return ",".join(dict.fromkeys(option.scheme for group in options for option in group))


def _within_kl(
    pairs: list[list[tuple[int, float]]], most: float, joint: Callable[[list[int]], float]
) -> tuple[list[int], float]:
    """The smallest choice whose measured KL is at most `most`, by bisection over the predicted KL."""
    frontier = Frontier(pairs, sum(max(size for size, _ in group) for group in pairs))
    best = [min(range(len(group)), key=lambda i: group[i][1]) for group in pairs]
    found, measured = best, joint(best)
    if measured > most:
        raise InputError(f"no plan has a KL of {most:g}: the least is {measured:.3g} with these candidates")
    low, high = sum(group[i][1] for group, i in zip(pairs, best, strict=True)), 2 * most
    for _ in range(JOINT_TRIES):
        middle = (low + high) / 2
        chosen = frontier.smallest(middle)
        if chosen is None:
            low = middle
        elif (kl := joint(chosen)) <= most:
            low = middle
            if _bytes(pairs, chosen) < _bytes(pairs, found):
                found, measured = chosen, kl
        else:
            high = middle
    return found, measured


def _bytes(pairs: list[list[tuple[int, float]]], chosen: list[int]) -> int:
    return sum(group[i][0] for group, i in zip(pairs, chosen, strict=True))
