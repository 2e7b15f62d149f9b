"""convert: the original project's .pt files, and the results of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.cli import run
from tests.helpers.originals import DUAL, IDS, QUAD, SINGLE, original_state, random_dmpt, same_model, save_dual
from tests.helpers.tolerances import TOLERANCE
from training.checkpoints.checkpoint import load_model, load_state
from training.checkpoints.original import read_original

LIMIT = TOLERANCE["float32", "torch"]


@pytest.mark.parametrize("head_gate", ["fc", "net"])
@pytest.mark.parametrize(("kind", "fields"), [("dual", DUAL), ("quad", QUAD), ("single", SINGLE)])
def test_convert_each_kind(
    kind: str, fields: dict[str, Any], head_gate: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    model = random_dmpt(**fields)
    stored = {"split_at_layer": 2, "gate_temp": 1.2, "use_head_mixture": True,
              "head_allocation": fields["head_allocation"]} if kind == "dual" else {}  # fmt: skip
    content = {
        "epoch": 0,
        "global_step": 3,
        "model_state_dict": original_state(model, kind, head_gate),
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5}]},
        "loss": 3.2,
        "model_config": stored,
    }
    torch.save(content, tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out", "--tokenizer", tokenizer_folder) == 0
    same_model(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@torch.no_grad()
def test_converted_dual_computes_what_the_original_computes(tmp_path: Path) -> None:
    """The original's forward pass, from its own tensors, with Hugging Face's blocks: an oracle that shares no code."""
    from transformers import GPT2Config, GPT2Model

    state = original_state(random_dmpt(**DUAL), "dual")
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    scores = {}
    for side, heads in DUAL["head_allocation"].items():
        first = {"shared_layers": 0, f"{side}_path": 2}
        blocks = [(name.split(".", 2), tensor) for name, tensor in state.items() if name.count(".") > 1]
        tensors = {f"h.{first[m] + int(i)}.{rest}": tensor for (m, i, rest), tensor in blocks if m in first}
        tensors |= {name: state[name] for name in ("wte.weight", "wpe.weight")}
        tensors |= {f"ln_f.{part}": state[f"ln_f_{side}.{part}"] for part in ("weight", "bias")}
        stack = GPT2Model(GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=4, n_head=1)).eval()
        stack.load_state_dict(tensors)
        out = stack(IDS, output_hidden_states=True)
        h, split = out.last_hidden_state, out.hidden_states[2]
        gate = f"_heads_gate_by_path.{side}"
        pi = linear(f"{gate}.fc2", torch.nn.functional.gelu(linear(f"{gate}.fc1", h))).log_softmax(-1)
        logits = [(h @ state[f"lm_head.perceptrons.{j}.weight"].T).log_softmax(-1) for j in heads]
        scores[side] = torch.logsumexp(torch.stack(logits, -1) + pi[..., None, :], -1)
    gate = linear("gate.2", torch.tanh(linear("gate.0", split)))
    hard = torch.where(gate.argmax(-1, keepdim=True) == 0, scores["left"], scores["right"])
    soft = (torch.stack(list(scores.values()), -1) + gate.log_softmax(-1)[..., None, :]).logsumexp(-1)
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 0
    model = load_model(tmp_path / "out")
    for mode, wanted in {"gate_hard": hard, "gate_soft": soft, "left_only": scores["left"]}.items():
        torch.testing.assert_close(model.log_probs(IDS, mode), wanted, atol=LIMIT, rtol=0)


def test_convert_the_variants_with_one_head_a_path(tmp_path: Path) -> None:
    dual = random_dmpt(splits=[3], head_allocation={"left": [0], "right": [1]})
    state = original_state(dual, "dual")
    for j, side in enumerate(("left", "right")):
        state[f"{side}_lm_head.weight"] = state.pop(f"lm_head.perceptrons.{j}.weight")
    torch.save({"model_state_dict": state}, tmp_path / "dual.pt")
    assert run("convert", tmp_path / "dual.pt", tmp_path / "dual") == 0
    same_model(dual, tmp_path / "dual")

    leaves = ["left_left", "left_right", "right_left", "right_right"]
    quad = random_dmpt(splits=[1, 2], head_allocation={leaf: [j] for j, leaf in enumerate(leaves)})
    state = original_state(quad, "quad")
    for j, leaf in enumerate(leaves):
        state[f"lm_head_{leaf}.weight"] = state.pop(f"lm_head.perceptrons.{j}.weight")
    torch.save({"model_state_dict": state}, tmp_path / "quad.pt")
    assert run("convert", tmp_path / "quad.pt", tmp_path / "quad") == 0
    same_model(quad, tmp_path / "quad")


def test_convert_accepts_wrapped_names_bare_state_and_a_whole_gpt2_config(tmp_path: Path) -> None:
    from transformers import GPT2Config

    model = random_dmpt(**DUAL)
    state = {f"module.{name}": tensor for name, tensor in original_state(model, "dual").items()}
    torch.save(state, tmp_path / "bare.pt")
    checkpoint, notes = read_original(tmp_path / "bare.pt")
    assert checkpoint.config.head_allocation == DUAL["head_allocation"]  # from the widths of the head gates
    assert any("inferred from the head gates" in note for note in notes)

    filed = GPT2Config(n_head=4, layer_norm_epsilon=1e-3, n_positions=16, eos_token_id=5)
    torch.save({"state_dict": original_state(model, "dual"), "model_config": filed}, tmp_path / "config.pt")
    checkpoint, _ = read_original(tmp_path / "config.pt")
    config = checkpoint.config
    assert (config.n_head, config.layer_norm_epsilon, config.eos_token_id) == (4, 1e-3, 5)
    assert config.n_positions == 64  # of the tensor: the original overwrote the field with its --max_length


def test_convert_says_what_it_had_to_infer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dual(tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 0
    told = capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("1 attention heads of 64", "gate_temp 1.0", "inferred from the head gates"):
        assert text in told
        assert text in card
    assert "--tokenizer" in told
    assert run("convert", tmp_path / "file.pt", tmp_path / "out", "--n-head", 8, "--overwrite") == 0
    assert load_state(tmp_path / "out")[0].n_head == 8


def test_heads_that_were_not_mixed(tmp_path: Path) -> None:
    """Without --use_head_mixture the original scores left by head 0 and right by head 1, whatever heads exist."""
    save_dual(tmp_path / "file.pt", use_head_mixture=False, head_allocation=None)
    checkpoint, notes = read_original(tmp_path / "file.pt")
    assert checkpoint.config.head_allocation == {"left": [0], "right": [1]}
    assert set(checkpoint.tensors) >= {"heads.0.weight", "heads.1.weight"}
    assert not any(name.startswith("head_gates") for name in checkpoint.tensors)
    assert any("3 heads belong to no leaf" in note for note in notes)


def test_heads_keep_their_leaf_when_ids_are_renumbered(tmp_path: Path) -> None:
    model = random_dmpt(splits=[2], head_allocation={"left": [0, 1], "right": [2, 3]})
    state = original_state(model, "dual")
    for new, old in ((7, 3), (5, 2), (3, 1)):  # original ids 0, 3, 5, 7; no leaf uses the others
        state[f"lm_head.perceptrons.{new}.weight"] = state.pop(f"lm_head.perceptrons.{old}.weight")
    for unused in (1, 2, 4, 6):
        state[f"lm_head.perceptrons.{unused}.weight"] = torch.zeros(300, 64)
    filed = {"use_head_mixture": True, "head_allocation": {"left": [0, 3], "right": [5, 7]}}
    torch.save({"model_state_dict": state, "model_config": filed}, tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 0
    same_model(model, tmp_path / "out")


def test_head_equal_to_the_embedding_is_stored_once(tmp_path: Path) -> None:
    model = random_dmpt(**DUAL)
    with torch.no_grad():
        model.heads[0].weight.copy_(model.transformer.wte.weight)
    torch.save({"model_state_dict": original_state(model, "dual")}, tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 0
    assert load_state(tmp_path / "out")[0].tie_word_embeddings
    same_model(model, tmp_path / "out")
