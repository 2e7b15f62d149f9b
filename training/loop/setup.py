"""Checks and preparation before the first step: options, tokens, the run's folder, saved weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training.checkpoints.atomic import recover, sweep
from training.checkpoints.checkpoint import load_model
from training.checkpoints.earlier import RUN, SAVED, recover_earlier, set_aside
from training.checkpoints.places import check_run
from training.errors import InputError
from training.loop.options import TrainOptions
from training.model.config import DMPTConfig
from training.model.dmpt import Attention
from training.model.domains import served_domains
from training.model.generation import DMPTForCausalLM
from training.text.domains import Domains


def on_cpu(options: TrainOptions) -> bool:
    """Whether accelerate gets cpu=True: without it, processes on a machine without GPU do not find each other."""
    return options.cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def prepare_folder(out: Path, resume: bool | str | os.PathLike[str], overwrite: bool) -> None:
    """Prepare `out` for a run. Raises InputError as check_run.

    An earlier run in it is set aside until this one has saved its first checkpoint
    (training.checkpoints.earlier.settle).
    """
    recover_earlier(out, RUN, SAVED)
    for name in ("last", "best"):  # a kill in the middle of replacing them
        recover((out / name).resolve())
    for folder in (out, out / "last", out / "best"):
        sweep(folder)
    if not resume:
        check_run(out, overwrite)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {out}: {error.strerror}") from error
    if not resume:
        set_aside(out, RUN)


def resume_folder(out: Path, resume: bool | str | os.PathLike[str]) -> Path | None:
    """The checkpoint to resume from; None for a new run. `resume`: True means `out`, else a run's folder."""
    if not resume:
        return None
    given = out if resume is True else Path(resume)
    return given / "last" if (given / "last").is_dir() else given


def load_weights(model: DMPTForCausalLM, folder: Path) -> None:
    """Load a checkpoint's weights into `model`. Raises InputError when they do not fit."""
    try:
        model.load_state_dict(load_model(folder).state_dict())
    except RuntimeError as error:
        raise InputError(f"cannot resume: {folder} holds a different model than the given one") from error


def apply_to_config(model: DMPTForCausalLM, options: TrainOptions) -> None:
    """Copy model settings from the options into the model's config, and so into its checkpoints."""
    for name in ("gate_temp", "head_gate_temp", "head_topk", "fast_k"):
        if getattr(options, name) is not None:
            setattr(model.config, name, getattr(options, name))
    model.config.check()
    if options.dropout is not None:
        model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = options.dropout
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = options.dropout
            elif isinstance(module, Attention):
                module.attn_dropout = options.dropout


def domains_to_config(config: DMPTConfig, domains: Domains | None) -> tuple[str, ...]:
    """Names of the text's domains, which the config gets if it lacks them. Raises InputError as served_domains."""
    names = () if domains is None else domains.names
    if (served := served_domains(names, config.domains, config.head_allocation)) is not None:
        config.domains = served
        config.check()
    return names


def check_tokens(tokens: np.ndarray, eval_tokens: np.ndarray | None, vocab: int) -> None:
    """Raise InputError unless every token id is in the vocabulary and both texts have at least 2 tokens."""
    for name, ids in (("training", tokens), ("evaluation", eval_tokens)):
        if ids is not None and len(ids) < 2:
            raise InputError(f"the {name} text has {len(ids)} tokens, at least 2 are needed")
        if ids is not None and (int(ids.max()) >= vocab or int(ids.min()) < 0):
            raise InputError(
                f"the {name} text holds token {int(ids.max())}, the model's vocabulary has {vocab}: "
                "use the tokenizer that belongs to the model"
            )
