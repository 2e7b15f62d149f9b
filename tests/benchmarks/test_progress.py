"""Edited state files of an evaluation: the counts of a killed run, the log-probs of a base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality.divergence import Base
from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.perplexity import evaluate
from benchmarks.quality.progress import Findings
from tests.helpers.bench_fakes import FakeScorer, uniform
from training.errors import InputError, ValidationError

IDS = np.arange(80) * 7 % 300


def change(file: Path, **changes: Any) -> None:
    """Write an .npz file again with some of its arrays changed: its checksums fit."""
    with np.load(file) as stored:
        arrays = dict(stored)
    with open(file, "wb") as out:
        np.savez(out, **{name: changes[name](array) if name in changes else array for name, array in arrays.items()})


def state(file: Path) -> Findings:
    return Findings({"nll": np.zeros(9), "rank": np.zeros(9, np.int32)}, file, [1, 3, 2, 2, 1])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([3, 6]), "belongs to another evaluation"),  # four tokens are stored
        (np.array([2, 5]), "is damaged, 2 windows do not have 5 tokens"),
        (np.array([3, 4]), "is damaged, 3 windows do not have 4 tokens"),
        (np.array([-1, 4]), "is damaged"),
        (np.array([2, -4]), "is damaged"),
        (np.array([5, 4]), "is damaged, 5 windows do not have 4 tokens"),
        (np.array([0, 4]), "is damaged, 0 windows do not have 4 tokens"),
        (np.array([2, 4, 4]), "is damaged"),
        (np.array([2.0, 4.0]), "is damaged"),
        (np.array(2), "is damaged"),
    ],
)
def test_counts_that_do_not_agree_are_refused(counts: np.ndarray, message: str, tmp_path: Path) -> None:
    file = tmp_path / "state.npz"
    findings = state(file)
    findings.add(nll=np.arange(4.0), rank=np.arange(4, dtype=np.int32))
    findings.end_of_windows(2)
    findings.save()
    again = state(file)
    assert (again.windows, again.done) == (2, 4)
    assert again["nll"][:4].tolist() == [0, 1, 2, 3]
    change(file, counts=lambda _: counts)
    with pytest.raises(InputError, match=rf"state\.npz {message}.*: delete it to start the evaluation again"):
        state(file)


def test_a_state_is_its_own_evaluations(tmp_path: Path) -> None:
    """A state that was renamed to another's, or holds no valid losses, is not continued."""
    file, other = tmp_path / "state.npz", tmp_path / "other.npz"
    findings = state(file)
    findings.add(nll=np.arange(4.0), rank=np.arange(4, dtype=np.int32))
    findings.end_of_windows(2)
    findings.save()
    other.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"was state\.npz once and belongs to another evaluation"):
        state(other)
    change(file, nll=lambda nll: np.where(nll == 2, np.nan, nll))
    with pytest.raises(InputError, match="losses that are not finite"):
        state(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"gold": lambda gold: np.where(np.arange(len(gold)) == 3, -np.inf, gold)},
        {"gold": lambda gold: np.where(np.arange(len(gold)) == 3, np.nan, gold)},
        {"gold": lambda gold: gold[:-1]},
        {"rows": lambda rows: np.full_like(rows, np.nan)},
    ],
    ids=["never", "not a number", "too few", "rows"],
)
def test_a_base_whose_kept_log_probs_are_none_is_refused(
    changes: dict[str, Callable[[np.ndarray], np.ndarray]], tiny_gpt2: Path, tmp_path: Path
) -> None:
    scorer = open_scorer(tiny_gpt2)
    evaluate(scorer, IDS, 32, 16, base=Base(scorer, tmp_path))
    first, *_ = sorted(tmp_path.glob("base-*/*"))
    change(first, **changes)
    with pytest.raises(InputError, match=rf"{first.name} is damaged: delete .* and run again"):
        evaluate(scorer, IDS, 32, 16, base=Base(scorer, tmp_path))


def test_a_base_that_rules_out_the_text_is_no_base(tmp_path: Path) -> None:
    def certain(ids: np.ndarray) -> np.ndarray:
        """Every token is followed by itself."""
        with np.errstate(divide="ignore"):
            return np.log(np.eye(50, dtype=np.float32)[ids])

    ids, base = np.array([3] * 10 + [4] * 10), Base(FakeScorer(certain, 50))
    with pytest.raises(ValidationError, match="fake gives token 4 of the text probability 0: it cannot be a base"):
        evaluate(FakeScorer(uniform(50), 50), ids, 8, 4, base=base)
