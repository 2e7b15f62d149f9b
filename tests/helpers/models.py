"""Random models whose routes switch and whose log-probs spread, so that parity means something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quant.calibration import Calibration
from training.checkpoints.checkpoint import read_config, save_model
from training.model.config import DMPTConfig
from training.model.generation import DMPTForCausalLM
from training.model.shape import even_allocation, leaf_names


def random_model(splits: list[int], heads: int, seed: int = 0, std: float = 0.15, **fields: Any) -> DMPTForCausalLM:
    """A tiny model: weights large enough that every layer, gate and head matters at fp32 tolerance."""
    sizes: dict[str, Any] = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4} | fields
    sizes.setdefault("head_allocation", even_allocation(leaf_names(splits, sizes["n_layer"]), heads))
    sizes.setdefault("gate_hidden", 16)
    sizes.setdefault("tie_word_embeddings", heads == 1)
    config = DMPTConfig(splits=splits, bos_token_id=0, eos_token_id=0, **sizes)
    torch.manual_seed(seed)
    model = DMPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=1.0 if "gates" in name else std)
            if ".ln_" in name and name.endswith("weight"):
                parameter += 1
    return model


def saved_model(out: Path, splits: list[int], heads: int, seed: int = 0, **fields: Any) -> Path:
    """A checkpoint folder of random_model()."""
    save_model(random_model(splits, heads, seed, **fields), out)
    return out


def random_calibration(source: Path) -> Calibration:
    """Random tokens for a checkpoint that has no tokenizer."""
    config = read_config(source)
    length = min(32, config.n_positions)
    windows = torch.randint(config.vocab_size, (6, length), generator=torch.Generator().manual_seed(5))
    return Calibration(windows, "0" * 64, perplexity=50.0, vocab_size=config.vocab_size)


def modes(model: DMPTForCausalLM) -> list[str]:
    """The path modes of every model, and the one of each of its leaves."""
    return ["gate_soft", "gate_hard", "max_prob", *(f"{leaf}_only" for leaf in model.config.leaves)]
