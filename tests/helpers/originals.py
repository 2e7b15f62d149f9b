"""Files as the original project wrote them, made of random models of this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.models import modes
from training.checkpoints.checkpoint import load_model, load_state
from training.model.config import DMPTConfig
from training.model.generation import DMPTForCausalLM

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(5))
BLOCK_MODULES = {
    "dual": {"": "shared_layers", "left": "left_path", "right": "right_path"},
    "quad": {"": "shared_layers", "left": "left_intermediate", "right": "right_intermediate"}
    | {leaf: f"path_{leaf}" for leaf in ("left_left", "left_right", "right_left", "right_right")},
    "single": {"": "transformer.h"},
}
GATES = {
    "dual": {"root": "gate"},
    "quad": {"root": "gate_1", "left": "gate_2_left", "right": "gate_2_right"},
    "single": {},
}


def original_state(model: DMPTForCausalLM, kind: str, head_gate: str = "fc") -> dict[str, Tensor]:
    """The names the original gives to the tensors of `model`, written down independently of
    training.checkpoints.original."""
    layer = {"fc": {"0": "fc1", "2": "fc2"}, "net": {"0": "net.0", "2": "net.2"}}[head_gate]
    prefix = "transformer." if kind == "single" else ""
    tree = model.config.tree
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "heads":
            new = f"lm_head.perceptrons.{parts[1]}.weight"
        elif parts[0] == "gates":
            new = ".".join([GATES[kind][parts[1]], *parts[2:]])
        elif parts[0] == "head_gates":
            owner = "gate" if kind == "single" else f"_heads_gate_by_path.{parts[1]}"
            new = f"{owner}.{layer[parts[2]]}.{parts[3]}"
        elif parts[1] in ("wte", "wpe"):
            new = prefix + ".".join(parts[1:])
        else:
            node = "" if parts[0] == "transformer" else parts.pop(1)
            rest = parts[1:]
            if rest[0] == "ln_f":
                new = f"transformer.ln_f.{rest[1]}" if kind == "single" else f"ln_f_{node}.{rest[1]}"
            else:
                index = int(rest[1]) - tree[node or "root"].start
                new = ".".join([BLOCK_MODULES[kind][node], str(index), *rest[2:]])
        out[new] = tensor.clone()
    for leaf, ids in model.config.head_allocation.items():
        if (
            len(ids) == 1 and model.head_gates
        ):  # the original gives every leaf a head gate, also where there is no choice
            gate = f"_heads_gate_by_path.{leaf}"
            out |= {f"{gate}.{layer['0']}.weight": torch.ones(16, 64), f"{gate}.{layer['0']}.bias": torch.ones(16)}
            out |= {f"{gate}.{layer['2']}.weight": torch.ones(1, 16), f"{gate}.{layer['2']}.bias": torch.ones(1)}
    heads = model.config.n_vocab_heads
    out |= {"lm_head.usage_counts": torch.zeros(heads), "lm_head.selection_counts": torch.zeros(heads)}
    return out


def random_dmpt(**fields: Any) -> DMPTForCausalLM:
    from tests.conftest import randomize_vectors

    torch.manual_seed(2)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 1, "gate_hidden": 16}
    config = DMPTConfig(**(sizes | {"gate_temp": 1.0, "tie_word_embeddings": False, "initializer_range": 0.2} | fields))
    model = DMPTForCausalLM(config).eval()
    randomize_vectors(model)
    return model


DUAL = {"splits": [2], "head_allocation": {"left": [0, 1, 2], "right": [3, 4]}}
QUAD = {"splits": [1, 3], "head_allocation": {"left_left": [0], "left_right": [1], "right_left": [2, 3, 4],
                                              "right_right": [5, 6, 7]}}  # fmt: skip
SINGLE = {"splits": [], "head_allocation": {"root": [0, 1, 2]}}


def same_model(model: DMPTForCausalLM, out: Path) -> None:
    """Same tensors bit by bit, same log-probs in every mode."""
    config, state = load_state(out)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name in state}
    assert set(wanted) == set(state)
    for name, tensor in wanted.items():
        assert tensor.numpy().tobytes() == state[name].tobytes(), name
    assert config.splits == model.config.splits
    assert config.head_allocation == model.config.head_allocation
    again = load_model(out)
    with torch.no_grad():
        for mode in modes(model):
            assert torch.equal(again.log_probs(IDS, mode), model.log_probs(IDS, mode))


def save_dual(path: Path, **model_config: Any) -> DMPTForCausalLM:
    model = random_dmpt(**DUAL)
    torch.save({"model_state_dict": original_state(model, "dual"), "model_config": model_config}, path)
    return model
