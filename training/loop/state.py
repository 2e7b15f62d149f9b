"""A training run on disk: everything needed to resume, in safetensors and JSON.

OUT/last/                   newest checkpoint; a model folder
    trainer_state/          state.json, optimizer.safetensors, rng.safetensors; where the options need them
                            tether.safetensors, domains.safetensors
OUT/best/                   checkpoint with the lowest held-out loss (with evaluation data); a model folder
OUT/metrics.jsonl           one object per log line, evaluation and warning
OUT/config.json, ...        after training: the model to use, the same files as in best (else last)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.checkpoints.atomic import atomic_folder
from training.checkpoints.checkpoint import write_model
from training.checkpoints.files import read_json
from training.checkpoints.places import beside
from training.checkpoints.tensors import write_tensors
from training.errors import FieldError, InputError
from training.model.generation import DMPTForCausalLM
from training.text.domains import Domains

STATE = "trainer_state"
FORMAT = 1


@dataclass
class Progress:
    """The progress of a run. Plain numbers and strings, stored as JSON (which keeps floats exactly)."""

    step: int = 0  # optimizer steps done
    position: int = 0  # sequences taken from the data, over all passes
    seconds: float = 0.0  # that the run has taken, without pauses between calls
    best_loss: float | None = None  # lowest held-out loss so far
    finished: bool = False
    meter: dict[str, float] = field(default_factory=dict)  # sums since the last log line
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # determines the order of the data
    about: dict[str, Any] = field(default_factory=dict)  # the caller's own data
    record: dict[str, Any] = field(default_factory=dict)  # training before this run (training.checkpoints.record)
    format_version: int = FORMAT


def save_run(
    folder: Path,
    model: DMPTForCausalLM,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    tensors: dict[str, dict[str, Tensor]],
    tokenizer_from: str | os.PathLike[str] | None,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Write OUT/last: model and trainer state together, in one atomic step.

    tensors: the state besides the optimizer's, by file stem; rng is always there.
    """
    with atomic_folder(folder, "checkpoint") as tmp:
        write_model(model, tmp, tokenizer_from, name=folder.parent.resolve().name, source=source)
        state = tmp / STATE
        state.mkdir()
        optimizer_tensors, scalars = optimizer_state(optimizer)
        for name, own in ({"optimizer": optimizer_tensors} | tensors).items():
            write_tensors(state / f"{name}.safetensors", own)
        (state / "state.json").write_text(json.dumps(vars(progress) | {"optimizer": scalars}, indent=1) + "\n")


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name: ({"NAME/KEY": tensor}, {"NAME/KEY": number})."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    scalars[f"{name}/{key}"] = value
    return tensors, scalars


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Restore optimizer_state(). Raises InputError when a name is not one of the optimizer's parameters."""
    names = [name for group in optimizer.param_groups for name in group["names"]]
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for full, value in {**tensors, **scalars}.items():
        name, _, key = full.rpartition("/")
        if name not in index:
            raise InputError(f"the saved optimizer state holds '{name}', which this model lacks")
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_run(folder: Path) -> tuple[Progress, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(progress, optimizer numbers, {file stem: tensors}) of a checkpoint with trainer state.

    Raises InputError when the state or a file is missing or damaged, or when its format version is unknown.
    """
    state = folder / STATE
    if not state.is_dir():
        raise FieldError("cannot resume: {} has no {}; start without {resume}, or give the run's folder", folder, STATE)
    values = read_json(state / "state.json")
    scalars = values.pop("optimizer", {})
    if values.get("format_version") != FORMAT:
        raise InputError(
            f"cannot resume: {state} has format {values.get('format_version')}, this version reads {FORMAT}"
        )
    try:
        progress = Progress(**values)
        files = {path.stem: load_file(path) for path in sorted(state.glob("*.safetensors"))}
    except (TypeError, OSError, SafetensorError) as error:
        raise InputError(f"cannot resume: {state} is damaged ({error}); use an older checkpoint") from error
    missing = [name for name in ("optimizer", "rng") if name not in files]
    if missing:
        raise InputError(f"cannot resume: {state} lacks {', '.join(f'{name}.safetensors' for name in missing)}")
    return progress, scalars, files


def domain_tensors(domains: Domains) -> dict[str, Tensor]:
    return {"ends": torch.from_numpy(domains.ends), "labels": torch.from_numpy(domains.labels)}


def saved_domains(run: Path, names: Sequence[str]) -> Domains | None:
    """The domains that a run, or a phase of it, was saved with; None where none was saved."""
    for file in sorted(run.glob(f"**/{STATE}/domains.safetensors")):
        try:
            tensors = load_file(file)
            return Domains(tuple(names), tensors["ends"].numpy(), tensors["labels"].numpy())
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"cannot resume: {file} is damaged ({error}); use an older checkpoint") from error
    return None


# --- random numbers: one state per process --------------------------------------------------------------


def rng_state(accelerator: Accelerator) -> dict[str, Tensor]:
    """Random states of all processes, uint8 (processes, bytes), in every process."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    gathered = {key: accelerator.gather(value[None].to(accelerator.device)) for key, value in states.items()}
    return {key: value.cpu() for key, value in gathered.items()}


def restore_rng(accelerator: Accelerator, states: dict[str, Tensor]) -> None:
    """Restore this process's random state; a process without a saved state keeps its own."""
    rank = accelerator.process_index
    if rank < len(states["cpu"]):
        torch.set_rng_state(states["cpu"][rank].contiguous())
    if accelerator.device.type == "cuda" and rank < len(states.get("cuda", ())):
        torch.cuda.set_rng_state(states["cuda"][rank].contiguous(), accelerator.device)


# --- the model to use -----------------------------------------------------------------------------------


def publish(source: Path, out: Path) -> None:
    """Make `out` itself a model folder with the files of `source`, as hard links where the file system has them.

    Each file replaces an older one in one step, so `out` always holds a whole model once it had one.
    """
    for path in sorted(source.iterdir()):
        target = out / path.name
        # Of two names of one file, the system keeps both when one replaces the other.
        if not path.is_file() or (target.is_file() and target.samefile(path)):
            continue
        tmp = beside(target, "tmp")
        try:
            try:
                os.link(path, tmp)
            except OSError:
                shutil.copyfile(path, tmp)
            os.replace(tmp, target)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
