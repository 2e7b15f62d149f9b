"""What would fit when no plan does: estimates of the least size with other candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature

from quant.forms.packing import fit_block
from quant.planning.groups import Group, candidates_of, groups_of
from quant.rules import FLOAT, LINEAR, Rule, parse_rule
from quant.schemes import SCHEMES
from quant.schemes.blockwise import FIELD
from quant.schemes.low_rank import BITS, BLOCK, DELTAS, RIGHT_BITS, RIGHT_BLOCK
from training.errors import InputError

SCALE = 4  # bytes
# From the smallest loss to the largest
TRIES = ("int4-gptq:128", "int4-gptq:128,delta-r16", "int2-gptq:128,int4-gptq:128", "int2-gptq:128,delta-r16")


def ways_out(groups: Sequence[Group], shapes: Mapping[str, Sequence[int]], size: float, least: float) -> str:
    """The least size of each list of candidates that goes below `least`, and with projected heads; those within `size`
    fit.

    shapes: as in the checkpoint; size, least: bytes, with everything that stays float32.
    """
    rest = sum(math.prod(shape) for shape in shapes.values()) - sum(group.weights for group in groups)
    found: list[tuple[str, int]] = []
    for candidates in TRIES:
        try:
            smallest = 4 * rest + sum(least_bytes(group, shapes, candidates) for group in groups)
        except InputError:  # it cannot store some group
            continue
        if smallest < least and (not found or smallest < found[-1][1]):
            found.append((candidates, smallest))

    def told(what: str, size_of: int) -> str:
        return f"{what}: {size_of / 1e6:.2f} MB{', fits' if size_of <= size else ''}"

    said = "no other candidates are smaller"
    if found:
        said = f"least sizes with other candidates: {'; '.join(told(*pair) for pair in found)}"
    if (small := with_projected_heads(groups, shapes)) is not None and small < least:
        said += f". {told(f'Projected heads (dmpt-export convert --heads projected) and {TRIES[0]}', small)}"
    return said


def with_projected_heads(groups: Sequence[Group], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Least bytes of the whole model with projections in place of heads that could be deltas; None without such."""
    heads = {name for group in groups if group.anchor for name in group.tensors}
    if not heads:
        return None
    smaller: dict[str, Sequence[int]] = {name: shape for name, shape in shapes.items() if name not in heads}
    smaller |= {f"{name.removesuffix('weight')}projection.weight": 2 * (shapes[name][1],) for name in heads}
    stored = groups_of(smaller, {})
    rest = sum(math.prod(shape) for shape in smaller.values()) - sum(group.weights for group in stored)
    return 4 * rest + sum(least_bytes(group, smaller, TRIES[0]) for group in stored)


def least_bytes(group: Group, shapes: Mapping[str, Sequence[int]], candidates: str) -> int:
    """Of a group under the smallest of the candidates. Raises InputError when none can store it."""
    rules = [parse_rule(f"*={scheme}") for scheme in candidates_of(group, candidates)]
    return min(sum(estimate(rule, name, shapes[name], len(group.tensors)) for name in group.tensors) for rule in rules)


def estimate(rule: Rule, name: str, shape: Sequence[int], sharers: int) -> int:
    """Bytes of a matrix stored by a rule: codes and scales, without zero points. sharers: heads of one left factor."""
    width, rows = (shape[0], shape[1]) if LINEAR.fullmatch(name) else (shape[1], shape[0])
    if rule.scheme in DELTAS:
        rank = DELTAS[rule.scheme]
        left = _blocks(rows, rank, BITS, fit_block(rule.block or BLOCK, rank))
        return _blocks(rank, width, RIGHT_BITS, fit_block(RIGHT_BLOCK, width)) + left // sharers
    if rule.scheme == FLOAT:
        return 4 * rows * width
    scheme = SCHEMES[rule.scheme]
    if not scheme.blocks:
        return rows * width * scheme.bits // 8
    block = rule.block or signature(scheme.quantize).parameters["block"].default
    return _blocks(rows, width, FIELD.get(scheme.bits, scheme.bits), fit_block(block, width))


def _blocks(rows: int, width: int, bits: int, block: int) -> int:
    blocks = -(-width // block)
    return rows * blocks * (block * bits // 8 + SCALE)
