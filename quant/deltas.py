"""Head deltas of a whole model: which head is a delta to which anchor, how to quantize them, and their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.delta import DeltaTensor
from quant.forms.packing import fit_block
from quant.forms.weights import Weight, form_of
from quant.rules import Rule
from quant.schemes.low_rank import BITS, BLOCK, DELTAS, RIGHT_BITS, RIGHT_BLOCK, low_rank
from training.errors import InputError

AGREED = ("anchor", "scheme", "block", "shape", "sharers")  # of heads with one left factor, in config.json


def groups(plan: Mapping[str, Rule], anchors: Mapping[str, set[str]]) -> Iterator[tuple[str, Rule, list[str]]]:
    """Yield (anchor, rule, heads that share a left factor): heads of the plan with the same anchor and storage."""
    out: dict[tuple[str, str, int | None], list[str]] = {}
    for name, rule in plan.items():
        if rule.scheme in DELTAS:
            (anchor,) = anchors[name]
            out.setdefault((anchor, rule.scheme, rule.block), []).append(name)
    for (anchor, _, _), names in out.items():
        yield anchor, plan[names[0]], names


def quantize_group(
    arrays: Mapping[str, NDArray[np.float32]],
    anchor_name: str,
    anchor: Weight,
    rule: Rule,
) -> dict[str, DeltaTensor]:
    """Heads [V, E] by name -> deltas to `anchor`, with one left factor. Raises InputError naming the heads."""
    names, stored = tuple(arrays), form_of(anchor)
    rank = DELTAS[rule.scheme]
    try:
        left, rights = low_rank(list(arrays.values()), stored, rank, rule.block or BLOCK)
    except InputError as error:
        raise InputError(f"{', '.join(names)}: {error}") from error
    return {
        name: DeltaTensor(stored, left, right, rule.scheme, anchor_name, names, i)
        for i, (name, right) in enumerate(zip(names, rights, strict=True))
    }


# --- files ----------------------------------------------------------------------------------------


def assemble(
    stored: dict[str, NDArray[Any]], entries: Mapping[str, dict[str, Any]], weights: Mapping[str, Weight]
) -> dict[str, DeltaTensor]:
    """Take the deltas' parts out of `stored` and join them with their anchors in `weights`.

    Raises InputError for parts that are missing, do not fit or have no anchor, and for heads that disagree about the
    factor they share.
    """
    out: dict[str, DeltaTensor] = {}
    lefts: dict[str, BlockwiseTensor] = {}
    for name, entry in entries.items():
        weight = weights.get(str(entry.get("anchor")))
        anchor = None if weight is None else form_of(weight)
        if anchor is None or anchor.adds_to_anchor:
            raise InputError(f"{name} is a delta to '{entry.get('anchor')}', which is not a stored matrix")
        check_sharers(name, entries)
        rank, (rows, width), sharers = DELTAS[entry["scheme"]], entry["shape"], entry["sharers"]
        owner, place = sharers[0], sharers.index(name)
        try:
            if owner not in lefts:
                lefts[owner] = _factor(stored, f"{owner}.left", BITS, entry["block"], (rows, rank))
            right = _factor(stored, f"{name}.right", RIGHT_BITS, fit_block(RIGHT_BLOCK, width), (rank, width))
            out[name] = DeltaTensor(
                anchor, lefts[owner], right, entry["scheme"], entry["anchor"], tuple(sharers), place
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return out


def check_sharers(name: str, entries: Mapping[str, dict[str, Any]]) -> None:
    """Raise InputError unless all heads that a delta lists as sharers of its factor list the same sharers."""
    sharers = entries[name].get("sharers")
    if not isinstance(sharers, list) or name not in sharers or any(str(other) not in entries for other in sharers):
        raise InputError(f"{name} is not among its sharers {sharers}")
    twice = sorted({other for other in sharers if sharers.count(other) > 1})
    if twice:
        raise InputError(f"{name} names {', '.join(twice)} twice among its sharers")
    for other in sharers:
        differ = [key for key in AGREED if entries[other].get(key) != entries[name][key]]
        if differ:
            raise InputError(f"{name} and {other} share a factor but differ in {', '.join(differ)}")


def _factor(
    stored: dict[str, NDArray[Any]], name: str, bits: int, block: int, shape: tuple[int, int]
) -> BlockwiseTensor:
    packed, scales = stored.pop(f"{name}.packed", None), stored.pop(f"{name}.scales", None)
    if packed is None or scales is None:
        raise InputError(f"{name}.packed or {name}.scales is missing")
    return BlockwiseTensor(packed, scales, None, bits, block, shape, f"int{bits}")
