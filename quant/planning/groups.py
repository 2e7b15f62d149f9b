"""Groups of tensors that are stored the same way, and the schemes that each can choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.rules import DRAFT, FLOAT, LINEAR, PROJECTION, ROWS, Rule, parse_rule
from quant.schemes import SCHEMES
from quant.schemes.low_rank import DELTAS
from training.errors import FieldError

# Deltas are left out for a group that has no anchor, or whose heads are too few or too narrow for their rank.
CANDIDATES = "int8,int4-gptq:16,int4-gptq:32,int4-gptq:64,int4-gptq:128,delta-r64,delta-r16"

FAST_CANDIDATES = "int8,int8-dynamic"  # of a plan for speed


@dataclass(frozen=True)
class Group:
    """Tensors that are stored the same way."""

    patterns: tuple[str, ...]  # of the rules that match them
    tensors: tuple[str, ...]
    weights: int
    anchor: str | None = None  # for heads that could be stored as deltas to it
    rank: int = 0  # the highest of such deltas

    def __str__(self) -> str:
        return " ".join(self.patterns)


def groups_of(shapes: Mapping[str, Sequence[int]], anchors: Mapping[str, set[str]]) -> list[Group]:
    """Attention and MLP of each block, all projections of heads, all draft heads, the embedding (with a tied head),
    each anchor, and a leaf's other heads.

    anchors: see quant.rules.anchors_of. Trunk first, then paths, then heads.
    """
    members: dict[str, list[str]] = {}
    for name in shapes:
        if LINEAR.fullmatch(name):
            block, _, _ = name.partition(".attn." if ".attn." in name else ".mlp.")
            members.setdefault(f"{block}.{'attn' if '.attn.' in name else 'mlp'}.*", []).append(name)
        elif DRAFT.fullmatch(name):
            members.setdefault("draft_heads.*", []).append(name)
        elif PROJECTION.fullmatch(name):
            members.setdefault("heads.*.projection*", []).append(name)
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
        weights = sum(math.prod(shapes[name]) for name in names)
        rank = min(shapes[names[0]][0], weights // shapes[names[0]][0]) if anchor else 0
        groups.append(Group(patterns, tuple(names), weights, anchor, rank))
    return groups


def candidates_of(group: Group, text: str) -> list[str]:
    """The schemes of a comma-separated list that can store the group, each once and by name: "8" is int8.

    A number of bits means GPTQ's scheme if there is one, as in rules with calibration text. int8-dynamic is for
    vocabulary matrices only if the list has no int8, which a processor reads as fast. Raises InputError when no scheme
    fits.
    """
    looked_up = any(ROWS.fullmatch(name) for name in group.tensors)

    def fits(rule: Rule) -> bool:
        if rule.scheme in DELTAS:
            return DELTAS[rule.scheme] <= group.rank
        if rule.scheme == FLOAT or not looked_up:
            return rule.scheme != FLOAT
        return SCHEMES[rule.scheme].rows and SCHEMES[rule.scheme].vocabulary not in listed

    rules = [parse_rule(f"{group.patterns[0]}={scheme.strip()}", calibrated=True) for scheme in text.split(",")]
    listed = {rule.scheme for rule in rules}
    fit = list(dict.fromkeys(str(rule).partition("=")[2] for rule in rules if fits(rule)))
    if not fit:
        raise FieldError("none of {candidates} {} can store {}: add int8 or int4", text, group)
    return fit


def check_candidates(text: str) -> None:
    """Raise InputError for a list of candidates that holds an unknown one."""
    for scheme in text.split(","):
        parse_rule(f"*={scheme.strip()}")
