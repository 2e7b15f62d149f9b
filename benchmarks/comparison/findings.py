"""Summarise what a comparison shows about DMPT."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.comparison.model_result import Row
from benchmarks.quality.divergence import standard_error
from benchmarks.quality.perplexity import Quality

SURE = 2.0  # standard errors of the paired difference; anything closer to zero counts as no difference


def reading(rows: Sequence[Row]) -> str:
    """DMPT rows against the control rows (plain GPT-2 fine-tuned on the same tokens) stored in the same scheme.

    One line. Without a control row the line reports the missing control instead of comparing with a model that had
    less training.
    """
    subjects = [row for row in rows if row.is_dmpt]
    controls = {row.scheme: row for row in reversed(rows) if row.control and not row.is_dmpt}
    if not subjects:
        return "None of these models is a DMPT, so this table does not show what DMPT gains."
    if not controls:
        return (
            "The control is missing: none of these models is marked as a plain GPT-2 fine-tuned on the same tokens, "
            "so this table does not show what DMPT's paths and heads gain."
        )
    schemes = [row.scheme for row in subjects]
    label = {row.name: row.scheme if schemes.count(row.scheme) == 1 else row.name for row in subjects}
    clauses = [f"{label[row.name]}: {clause(row, controls.get(row.scheme))}" for row in subjects]
    note = " (± two paired standard errors over tokens; other training runs may differ)"
    return (
        "DMPT against GPT-2 fine-tuned on the same tokens, at the same scheme: "
        f"{'; '.join(clauses)}{note if any('±' in c for c in clauses) else ''}."
    )


def clause(row: Row, control: Row | None) -> str:
    """One DMPT row beside its control, as in "perplexity 4.1 % ± 0.6 % lower, 1.82x the size, ..."."""
    if control is None:
        return "no such GPT-2 row"
    if not row.size_bytes or not control.size_bytes:
        return f"{row.name if not row.size_bytes else control.name} failed"
    parts = [perplexity_clause(row.quality, control.quality)] if row.quality and control.quality else []
    parts.append(f"{row.size_bytes / control.size_bytes:.2f}x the size")
    if row.speed and control.speed:
        mine, its = (s.to_json()["decode_tokens_per_s"] for s in (row.speed, control.speed))
        parts.append(f"{mine / its:.2f}x the decode speed")
    return ", ".join(parts)


def perplexity_clause(mine: Quality, its: Quality) -> str:
    if mine.tokens_sha256 != its.tokens_sha256 or mine.tokens_scored != its.tokens_scored:
        return "perplexities do not compare (different tokens)"
    difference = mine.nll - its.nll  # [tokens_scored], nats; paired, so the difficulty of a token cancels
    mean, error = float(difference.mean()), standard_error(difference)
    change, margin = 100 * math.expm1(mean), 100 * SURE * error * math.exp(mean)
    if abs(mean) <= SURE * error or mean == 0:
        return f"perplexity no different ({change:+.2f} % ± {margin:.2f} %)"
    return f"perplexity {abs(change):.2f} % ± {margin:.2f} % {'lower' if mean < 0 else 'higher'}"
