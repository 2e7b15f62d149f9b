"""What a comparison says about DMPT, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.comparison.model_result import Row
from benchmarks.quality.divergence import standard_error
from benchmarks.quality.perplexity import Quality

SURE = 2.0  # standard errors of the paired difference; anything nearer to zero is no difference


def reading(rows: Sequence[Row]) -> str:
    """DMPT rows against the control rows (plain GPT-2 fine-tuned on the same tokens) stored in the same scheme.

    One line. Without a DMPT row there is nothing to say; without a control row the line says that it is
    missing instead of comparing with a model that had less training.
    """
    subjects = [row for row in rows if row.is_dmpt]
    controls = {row.scheme: row for row in reversed(rows) if row.control and not row.is_dmpt}
    if not subjects:
        return "No DMPT is among these models, so nothing is said about what it gains."
    if not controls:
        return (
            "The control is missing: no plain GPT-2 fine-tuned on the same tokens is marked among these models, "
            "so this table does not say what DMPT's paths and heads gain."
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
        return "perplexities do not compare (other tokens)"
    difference = mine.nll - its.nll  # [tokens_scored], nats; paired, so what makes a token hard cancels
    mean, error = float(difference.mean()), standard_error(difference)
    change, margin = 100 * math.expm1(mean), 100 * SURE * error * math.exp(mean)
    if abs(mean) <= SURE * error or mean == 0:
        return f"perplexity no different ({change:+.2f} % ± {margin:.2f} %)"
    return f"perplexity {abs(change):.2f} % ± {margin:.2f} % {'lower' if mean < 0 else 'higher'}"
