"""Head deltas of a whole model: which head is a delta to which anchor, quantizing them, and their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.rules import Rule
from quant.schemes.low_rank import BITS, BLOCK, DELTAS, RIGHT_BITS, RIGHT_BLOCK, low_rank
from quant.tensor import DeltaTensor, QuantizedTensor, Weight, fit_block
from training.errors import InputError

AGREED = ("anchor", "scheme", "block", "shape", "sharers")  # of heads with one left factor, in config.json


def groups(plan: Mapping[str, Rule], anchors: Mapping[str, set[str]]) -> Iterator[tuple[str, Rule, list[str]]]:
    """(anchor, rule, heads that share a left factor): heads of the plan with one anchor, stored in one way."""
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
    assert not isinstance(anchor, DeltaTensor)
    names = tuple(arrays)
    rank = DELTAS[rule.scheme]
    try:
        left, rights = low_rank(list(arrays.values()), anchor, rank, rule.block or BLOCK)
    except InputError as error:
        raise InputError(f"{', '.join(names)}: {error}") from error
    return {
        name: DeltaTensor(anchor, left, right, rule.scheme, anchor_name, names, i)
        for i, (name, right) in enumerate(zip(names, rights, strict=True))
    }


def anchor_of(tensor: DeltaTensor) -> NDArray[np.float32]:
    """The anchor's matrix as it is stored, in float: [V, E]."""
    return tensor.anchor if isinstance(tensor.anchor, np.ndarray) else tensor.anchor.dequantize()


# --- files ----------------------------------------------------------------------------------------


def record(tensor: DeltaTensor) -> dict[str, Any]:
    """What config.json says about a delta besides what it says about every tensor."""
    return {"anchor": tensor.anchor_name, "sharers": list(tensor.sharers)}


def assemble(
    stored: dict[str, NDArray[Any]], entries: Mapping[str, dict[str, Any]], weights: Mapping[str, Weight]
) -> dict[str, DeltaTensor]:
    """Take the deltas' parts out of `stored` and put them together with their anchors among `weights`.

    Raises InputError for parts that are missing, do not fit or have no anchor, and for heads that do not agree about
    the factor they share.
    """
    out: dict[str, DeltaTensor] = {}
    lefts: dict[str, QuantizedTensor] = {}
    for name, entry in entries.items():
        anchor = weights.get(str(entry.get("anchor")))
        if anchor is None or isinstance(anchor, DeltaTensor):
            raise InputError(f"{name} is a delta to '{entry.get('anchor')}', which is no stored matrix")
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
    """Raise InputError unless all heads that a delta says it shares its factor with say the same of it."""
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
) -> QuantizedTensor:
    packed, scales = stored.pop(f"{name}.packed", None), stored.pop(f"{name}.scales", None)
    if packed is None or scales is None:
        raise InputError(f"{name}.packed or {name}.scales is missing")
    return QuantizedTensor(packed, scales, None, bits, block, shape, f"int{bits}")
