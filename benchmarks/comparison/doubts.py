"""Why speeds of a comparison may be off: a busy machine or one that drifted, rounds that scatter, equal graphs with
unequal times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from benchmarks.comparison.model_result import Row
from benchmarks.speed.noise import UNSTEADY, busy, drift, scatter


def noise(rows: Sequence[Row]) -> list[str]:
    """One line for each doubt; empty for a quiet machine."""
    timed = [row for row in rows if row.speed]
    lines = []
    if timed and timed[0].speed and (remark := busy(timed[0].speed.load_average)):
        lines.append(f"{remark[0].upper()}{remark[1:]}; repeat the timing on a quiet one.")
    if remark := drift([row.speed for row in timed if row.speed]):
        lines.append(f"{remark[0].upper()}{remark[1:]}; compare these speeds only with each other.")
    shares = {row.name: scatter(row.speed.first("tg").tokens_per_s) for row in timed if row.speed}
    if unsteady := [f"{name} {share:.0%}" for name, share in shares.items() if share > UNSTEADY]:
        lines.append(f"Unsteady decode speeds (spread of the middle half of the rounds): {', '.join(unsteady)}.")
    for one, other in combinations(timed, 2):
        a, b = sorted((one.decode_tokens_per_s or 0.0, other.decode_tokens_per_s or 0.0))
        if one.graph is not None and one.graph == other.graph and b > (1 + UNSTEADY) * a:
            lines.append(
                f"{one.name} and {other.name} are the same graph but decoded at {one.decode_tokens_per_s:.0f} and "
                f"{other.decode_tokens_per_s:.0f} tokens/s: differences up to {b / a - 1:.0%} are noise here."
            )
    return lines
