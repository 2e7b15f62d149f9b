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

from quant.planning.knapsack import Frontier
from quant.rules import FLOAT, LINEAR, ROWS, Rule, parse_rule
from quant.schemes import SCHEMES
from quant.schemes.low_rank import DELTAS
from training.errors import FieldError, InputError

CANDIDATES = "int8,int4-gptq:16,int4-gptq:32,int4-gptq:64,int4-gptq:128"
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
class Group:
    """Tensors that are stored the same way."""

    patterns: tuple[str, ...]  # of the rules that match them
    tensors: tuple[str, ...]
    weights: int
    anchor: str | None = None  # for heads that could be stored as deltas to it

    def __str__(self) -> str:
        return " ".join(self.patterns)


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

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.size / 1e6:g} MB"
        return f"a KL of {self.kl:g}" if self.kl is not None else f"{self.bits:g} bits per weight"


def groups_of(shapes: Mapping[str, Sequence[int]], anchors: Mapping[str, set[str]]) -> list[Group]:
    """Attention and MLP of each block, the embedding (with a tied head), each anchor, and a leaf's other heads.

    anchors: see quant.rules.anchors_of. Trunk first, then paths, then heads.
    """
    members: dict[str, list[str]] = {}
    for name in shapes:
        if LINEAR.fullmatch(name):
            block, _, _ = name.partition(".attn." if ".attn." in name else ".mlp.")
            members.setdefault(f"{block}.{'attn' if '.attn.' in name else 'mlp'}.*", []).append(name)
        elif ROWS.fullmatch(name):
            shared = " ".join(sorted(anchors.get(name, ())))
            members.setdefault(f"deltas to {shared}" if shared in shapes else name, []).append(name)
    order = sorted(
        members.items(),
        key=lambda item: (bool(ROWS.fullmatch(item[1][0])), not item[0].startswith("transformer.")),
    )
    groups = []
    for key, names in order:
        anchor = key.removeprefix("deltas to ") if key.startswith("deltas to ") else None
        rows = ROWS.fullmatch(names[0])
        patterns = tuple(name.removesuffix(".weight") for name in names) if rows else (key,)
        groups.append(Group(patterns, tuple(names), sum(math.prod(shapes[name]) for name in names), anchor))
    return groups


def candidates_of(group: Group, text: str) -> list[str]:
    """The schemes of a comma-separated list that can store the group, each once and by name: "8" is int8.

    A number of bits means GPTQ's scheme if there is one, as in rules with calibration text. Raises InputError when
    no scheme fits.
    """
    looked_up = any(ROWS.fullmatch(name) for name in group.tensors)

    def fits(rule: Rule) -> bool:
        if rule.scheme in DELTAS:
            return group.anchor is not None
        return rule.scheme != FLOAT and (SCHEMES[rule.scheme].rows or not looked_up)

    rules = [parse_rule(f"{group.patterns[0]}={scheme.strip()}", calibrated=True) for scheme in text.split(",")]
    fit = list(dict.fromkeys(str(rule).partition("=")[2] for rule in rules if fits(rule)))
    if not fit:
        raise FieldError("none of {candidates} {} can store {}: add int8 or int4", text, group)
    return fit


def check_candidates(text: str) -> None:
    """Raise InputError for a list of candidates that holds an unusable one."""
    for scheme in text.split(","):
        rule = parse_rule(f"*={scheme.strip()}")
        if rule.scheme == "int8-dynamic":
            raise InputError("int8-dynamic rounds activations, but a plan only measures weights: use int8")


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
        raise InputError(
            f"no plan fits {target}: the least is {least / 1e6:.2f} MB ({8 * least / weights:.2f} bits per weight) and "
            "scales with these candidates"
        )


def make_plan(
    groups: list[Group], options: list[list[Option]], target: Target, sizes: tuple[int, int, int],
    joint: Callable[[list[int]], float],
) -> Plan:  # fmt: skip
    """Choose an option for each group. Raises InputError for an impossible target and names the least possible one.

    sizes: bytes of the tensors outside all groups, weights of the whole model, and bytes of the file's header, which
    count towards a target size. joint: the measured KL of a whole choice.
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
            raise InputError(
                f"no plan fits {target}: the least is {(least + header) / 1e6:.2f} MB "
                f"({8 * least / weights:.2f} bits per weight) with these candidates"
            )
        return plan(chosen, joint(chosen))
    assert target.kl is not None
    return plan(*_within_kl(Frontier(pairs, largest), pairs, target.kl, joint))


def _within_kl(
    frontier: Frontier, pairs: list[list[tuple[int, float]]], most: float, joint: Callable[[list[int]], float]
) -> tuple[list[int], float]:
    """The smallest choice whose measured KL is at most `most`, by bisection over the predicted KL."""
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
