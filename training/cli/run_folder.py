"""Runs to resume: what --resume names, and what was saved there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.checkpoints.files import read_json
from training.errors import FieldError, InputError

if TYPE_CHECKING:
    pass


def run_of(given: Path) -> Path:
    """The run that `resume` names. The original project named a file in it, RUN/checkpoint_epoch_0_step_8200.pt."""
    if given.suffix != ".pt":
        return given
    if given.is_file():
        raise InputError(
            f"cannot resume {given}, a checkpoint of the original project: dmpt-export convert {given} MODEL, then "
            "train MODEL"
        )
    return given.parent


def last_of(run: Path) -> Path:
    return run / "last" if (run / "last").is_dir() else run


def saved_state(source: Path) -> dict[str, Any]:
    """state.json of a run to be resumed: its options and data are the defaults."""
    path = source / "trainer_state" / "state.json"
    if not path.is_file():
        raise FieldError("cannot resume: {} has no trainer_state; leave {resume} out, or give the run's folder", source)
    return read_json(path)
