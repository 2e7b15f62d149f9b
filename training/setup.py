"""What is checked and made ready before the first step: options, tokens, the run's folder, saved weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training.atomic import recover
from training.checkpoint import load_model
from training.data import windows
from training.errors import InputError
from training.model import Attention, DMPTForCausalLM
from training.options import TrainOptions


def on_cpu(options: TrainOptions) -> bool:
    """Whether to tell accelerate so; else several processes on a machine without GPU do not find each other."""
    return options.cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def check_folder(out: Path, overwrite: bool) -> None:
    """Raise InputError when a new run cannot go to `out`: it holds something else, or a run that is to be kept."""
    if not out.is_dir():
        if out.exists():
            raise InputError(f"{out} is a file: give a folder that does not exist yet")
        return
    ours = {path.name for path in out.iterdir()} & {"last", "metrics.jsonl"}
    if any(out.iterdir()) and not ours:
        raise InputError(f"{out} is not empty and holds no training run: give another folder")
    if "last" in ours and not overwrite:
        raise InputError(f"{out} holds a training run: continue it with --resume, or start anew with --overwrite")


def prepare_folder(out: Path, resume: bool | str | os.PathLike[str], overwrite: bool) -> None:
    """Make `out` ready for a run. Raises InputError as check_folder."""
    recover((out / "last").resolve())  # a kill in the middle of replacing OUT/last
    if not resume:
        check_folder(out, overwrite)
        for name in ("last", "best", "tensorboard"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}") from error


def resume_folder(out: Path, resume: bool | str | os.PathLike[str]) -> Path | None:
    """The checkpoint to resume from; None for a new run. `resume`: True means `out`, else a run's folder."""
    if not resume:
        return None
    given = out if resume is True else Path(resume)
    return given / "last" if (given / "last").is_dir() else given


def load_weights(model: DMPTForCausalLM, folder: Path) -> None:
    """Put a checkpoint's weights into `model`. Raises InputError when they do not fit."""
    try:
        model.load_state_dict(load_model(folder).state_dict())
    except RuntimeError as error:
        raise InputError(f"cannot resume: {folder} holds another model than the one given") from error


def apply_to_config(model: DMPTForCausalLM, options: TrainOptions) -> None:
    """Put the model's own settings that the options give into its config, and so into its checkpoints."""
    for name in ("gate_temp", "head_gate_temp", "head_topk", "fast_k"):
        if getattr(options, name) is not None:
            setattr(model.config, name, getattr(options, name))
    model.config.check()
    if options.dropout is not None:
        if options.dropout >= 1:
            raise InputError(f"--dropout {options.dropout} must be below 1")
        model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = options.dropout
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = options.dropout
            elif isinstance(module, Attention):
                module.attn_dropout = options.dropout


def eval_windows(options: TrainOptions, context: int, tokens: np.ndarray | None) -> tuple[int, int]:
    """(length, stride) of the evaluation windows. Raises InputError when they cannot be, or score none of `tokens`."""
    length = options.eval_length or context
    stride = options.eval_stride or max(1, length // 2)
    if length > context:
        raise InputError(f"--eval_length {length} must be at most the model's context of {context}")
    if tokens is not None and not any(windows(len(tokens), length, stride)):
        raise InputError(
            f"the evaluation text has {len(tokens)} tokens, and windows of {length} advancing by {stride} score only "
            f"those after the first {length - stride}: give more text or a smaller --eval_length"
        )
    return length, stride


def check_tokens(tokens: np.ndarray, eval_tokens: np.ndarray | None, vocab: int) -> None:
    """Raise InputError unless every token id is in the vocabulary and there are some of each."""
    for name, ids in (("training", tokens), ("evaluation", eval_tokens)):
        if ids is not None and len(ids) < 2:
            raise InputError(f"the {name} text has {len(ids)} tokens, at least 2 are needed")
        if ids is not None and (int(ids.max()) >= vocab or int(ids.min()) < 0):
            raise InputError(
                f"the {name} text holds token {int(ids.max())}, the model's vocabulary has {vocab}: "
                "use the tokenizer that belongs to the model"
            )
