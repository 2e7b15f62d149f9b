"""The domains of `--learn-domains`: found once, by the main process, and kept with the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast

from training.loop.clusters import learn_domains
from training.loop.options import TrainOptions
from training.loop.state import saved_domains
from training.model.generation import DMPTForCausalLM
from training.text.domains import Domains


def learned(
    names: Sequence[str],
    resumed: Path | None,
    model: DMPTForCausalLM,
    tokens: np.ndarray,
    options: TrainOptions,
    device: torch.device,
) -> Domains:
    """The domains that a resumed run was saved with; else found now, by the main process for all of them.

    Raises InputError as learn_domains, and for a damaged run.
    """
    if resumed is not None and (saved := saved_domains(resumed, names)) is not None:
        return saved
    length, processes = min(options.max_length, model.config.n_positions), PartialState()
    pieces = np.zeros((2, max(0, len(tokens) - 1) // length + 1), np.int64)
    if processes.is_main_process:
        found = learn_domains(model.to(device), tokens, length, len(names), options.seed)
        pieces = np.stack([found.ends, found.labels])
    if processes.num_processes > 1:
        pieces = broadcast(torch.from_numpy(pieces).to(device)).cpu().numpy()
    return Domains(tuple(names), pieces[0], pieces[1].astype(np.int16))
