"""Summarise what a comparison shows about DMPT."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.comparison.equal_training import controls, trained_alike, unequal, what_is_equal
from benchmarks.comparison.model_result import Row
from benchmarks.quality.divergence import standard_error
from benchmarks.quality.perplexity import Quality

SURE = 2.0  # standard errors of the paired difference; anything closer to zero counts as no difference


def reading(rows: Sequence[Row]) -> str:
    """DMPT rows against the control rows (plain GPT-2) stored in the same scheme, in one line.

    A perplexity counts as a gain only where both models are recorded to come from the same base and to have been
    trained equally (benchmarks.comparison.equal_training). Without a control row the line reports that it is missing.
    """
    subjects = [row for row in rows if row.is_dmpt]
    control_of = controls(rows)
    if not subjects:
        return "None of these models is a DMPT, so this table does not show what DMPT gains."
    if not control_of:
        return (
            "The control is missing: none of these models is marked as the plain GPT-2 to compare with, "
            "so this table does not show what DMPT's paths and heads gain."
        )
    schemes = [row.scheme for row in subjects]
    label = {row.name: row.scheme if schemes.count(row.scheme) == 1 else row.name for row in subjects}
    clauses = [
        f"{label[row.name]}: {clause(row, its) if (its := control_of.get(row.scheme)) else apart(row, control_of)}"
        for row in subjects
    ]
    note = " (± two paired standard errors over tokens; other training runs may differ)"
    pairs = [(row, control_of[row.scheme]) for row in subjects if row.scheme in control_of]
    alike = {what_is_equal(*pair) if trained_alike(*pair) else None for pair in pairs}
    beside = f"GPT-2 {alike.pop()}" if len(alike) == 1 and None not in alike else "the control"
    return (
        f"DMPT against {beside}, at the same scheme: "
        f"{'; '.join(clauses)}{note if any('±' in c for c in clauses) else ''}."
    )


def apart(row: Row, control_of: dict[str, Row]) -> str:
    """Why a DMPT row has no verdict beside controls stored otherwise: size and speed would measure the storage."""
    stored = ", ".join(f"{control.name} as {scheme}" for scheme, control in reversed(control_of.items()))
    return f"no verdict (stored as {row.scheme}, but {stored})"


def clause(row: Row, control: Row) -> str:
    """One DMPT row beside its control, as in "perplexity 4.1 % ± 0.6 % lower, 1.82x the size, ..."."""
    if not row.size_bytes or not control.size_bytes:
        return f"{row.name if not row.size_bytes else control.name} failed"
    parts = []
    if row.quality and control.quality:
        unlike = trained_alike(row, control) is False
        parts.append(unequal(row, control) if unlike else perplexity_clause(row.quality, control.quality))
    parts.append(f"{row.size_bytes / control.size_bytes:.2f}x the size")
    if row.speed and control.speed:
        mine, its = (s.to_json()["decode_tokens_per_s"] for s in (row.speed, control.speed))
        parts.append(f"{mine / its:.2f}x the decode speed")
    elif row.speed and control.is_checkpoint:
        parts.append(f"no decode speed ({control.name} is a checkpoint: export it to time it)")
    unknown = " (equal training not recorded)" if row.quality and trained_alike(row, control) is None else ""
    return f"{', '.join(parts)}{unknown}"


def perplexity_clause(mine: Quality, its: Quality) -> str:
    if mine.tokens_sha256 != its.tokens_sha256 or mine.tokens_scored != its.tokens_scored:
        return "perplexities do not compare (different tokens)"
    difference = mine.nll - its.nll  # [tokens_scored], nats; paired, so the difficulty of a token cancels
    mean, error = float(difference.mean()), standard_error(difference)
    change, margin = 100 * math.expm1(mean), 100 * SURE * error * math.exp(mean)
    if abs(mean) <= SURE * error or mean == 0:
        return f"perplexity no different ({change:+.2f} % ± {margin:.2f} %)"
    return f"perplexity {abs(change):.2f} % ± {margin:.2f} % {'lower' if mean < 0 else 'higher'}"
