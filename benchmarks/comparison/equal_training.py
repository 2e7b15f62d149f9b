"""Whether a model and its control were trained equally, and with which differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.comparison.model_result import Row
from training.checkpoints.record import Record


def controls(rows: Sequence[Row]) -> dict[str, Row]:
    """The control of each scheme: the first one of several."""
    return {row.scheme: row for row in reversed(rows) if row.control and not row.is_dmpt}


def trained_alike(row: Row, control: Row) -> bool | None:
    """Whether both come from one base and saw as many tokens of each text, or are the best steps of runs that did;
    None where that is not recorded."""
    mine, its = row.training, control.training
    if mine is None or its is None or not mine.phases or not its.phases:
        return None
    return mine.base == its.base and (mine.tokens_by_text == its.tokens_by_text or best_of_equal_runs(mine, its))


def best_of_equal_runs(mine: Record, its: Record) -> bool:
    """Whether the runs are pairwise of one text and length, where each that ends early was chosen by held-out text."""
    return len(mine.phases) == len(its.phases) and all(
        a.data == b.data and (a.tokens == b.tokens or (a.best_of is not None and a.best_of == b.best_of))
        for a, b in zip(mine.phases, its.phases, strict=True)
    )


def what_is_equal(row: Row, control: Row) -> str:
    """How two models that are trained_alike were trained, to follow "GPT-2"."""
    assert row.training is not None
    assert control.training is not None
    if row.training.tokens_by_text == control.training.tokens_by_text:
        return f"trained on the same {row.training.tokens:,} tokens"
    return f"from a run over the same {row.training.run_tokens:,} tokens (each at its best step on held-out text)"


def unequal(row: Row, control: Row) -> str:
    """Why the perplexities of two models say nothing about paths and heads."""
    mine, its = row.training, control.training
    assert mine is not None
    assert its is not None
    if mine.base != its.base:
        return f"no verdict ({row.name} and {control.name} were trained from different models)"
    if mine.tokens == its.tokens:
        return f"no verdict ({row.name} and {control.name} were trained on different text)"
    return f"no verdict ({row.name} was trained on {amount(mine)}, {control.name} on {amount(its)})"


def amount(record: Record) -> str:
    whole = f", the best of {record.run_tokens:,}" if record.run_tokens != record.tokens else ""
    return f"{record.tokens:,} tokens{whole}"


def training_notes(rows: Sequence[Row]) -> list[str]:
    """Lines on how the training of models that count as equally trained still differed from their control's."""
    names: dict[str, list[str]] = {}
    for row in rows:
        control = controls(rows).get(row.scheme)
        if row.is_dmpt and control is not None and trained_alike(row, control):
            for remark in remarks(row, control):
                names.setdefault(remark, []).append(row.name)
    return [f"{', '.join(own)}: {remark}" for remark, own in names.items()]


def remarks(row: Row, control: Row) -> Iterator[str]:
    """On two models that are trained_alike."""
    mine, its = row.training, control.training
    assert mine is not None
    assert its is not None
    if mine.tokens_by_text != its.tokens_by_text:
        yield (
            f"the best step on held-out text, after {mine.tokens:,} of {mine.run_tokens:,} tokens; the control's is "
            f"after {its.tokens:,}."
        )
    if unlike := different_settings(mine, its):
        yield f"trained with other settings than the control: {', '.join(unlike)}."


def different_settings(mine: Record, its: Record) -> list[str]:
    """As in "lr 0.0006 (control 2e-05)"; empty where settings are not recorded."""
    if not all(phase.settings for phase in (*mine.phases, *its.phases)):
        return []
    if len(mine.phases) != len(its.phases):
        return [f"{len(mine.phases)} runs (control {len(its.phases)})"]
    found = []
    for a, b in zip(mine.phases, its.phases, strict=True):
        both = {"length": (a.length, b.length)}
        both |= {name: (value, b.settings[name]) for name, value in a.settings.items() if name in b.settings}
        found += [f"{n.replace('_', ' ')} {x} (control {y})" for n, (x, y) in both.items() if x != y]
    return list(dict.fromkeys(found))
