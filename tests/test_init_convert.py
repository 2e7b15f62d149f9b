"""init: a DMPT that starts as the GPT-2 it came from. convert: the original project's .pt files."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to plant a payload that must not run
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmpt_export.cli import main
from tests.tolerances import TOLERANCE
from training.checkpoint import load_model, load_state
from training.config import DMPTConfig
from training.errors import InputError
from training.folder import read_head_allocation
from training.init import init_from_gpt2
from training.model import DMPTForCausalLM
from training.original import read_original
from training.shape import default_heads

LIMIT = TOLERANCE["float32", "torch"]
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> DMPTForCausalLM:
    return load_model(tiny_gpt2)


@pytest.fixture(scope="module")
def gpt2_log_probs(tiny_gpt2: Path) -> Tensor:
    """What Hugging Face's own GPT-2 says: the oracle."""
    from transformers import GPT2LMHeadModel

    with torch.no_grad():
        return torch.log_softmax(GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()(IDS).logits, -1)


def modes(model: DMPTForCausalLM) -> list[str]:
    return ["gate_soft", "gate_hard", "max_prob", *(f"{leaf}_only" for leaf in model.config.leaves)]


# --- init_from_gpt2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "more"),
    [
        (None, {}),
        ([1], {"heads": 2}),
        ([1, 3], {"head_allocation": {"left_left": [0], "left_right": [1], "right_left": [2, 3, 4],
                                      "right_right": [5, 6, 7]}, "head_topk": 2}),
        ([1, 2, 3], {}),
        ([], {"heads": 3}),
        ([], {"heads": 1}),
        ([2], {"tie": False}),
        ([2], {"head_allocation": {"left": [3, 1], "right": [2, 0]}}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_without_noise_every_mode_says_what_gpt2_says(
    splits: list[int] | None, more: dict[str, Any], gpt2: DMPTForCausalLM, gpt2_log_probs: Tensor
) -> None:
    model = init_from_gpt2(gpt2, splits, noise=0, **more)
    assert model.config.splits == ([2] if splits is None else splits)
    for mode in modes(model):
        for fast_k in (None, 16, 300):
            torch.testing.assert_close(model.log_probs(IDS, mode, fast_k), gpt2_log_probs, atol=LIMIT, rtol=0)


@torch.no_grad()
def test_noise_moves_all_heads_but_the_anchors(gpt2: DMPTForCausalLM, gpt2_log_probs: Tensor) -> None:
    wte = gpt2.transformer.wte.weight
    noisy = init_from_gpt2(gpt2, noise=0.05, seed=1)
    for j, head in enumerate(noisy.heads):
        moved = (head.weight - wte).std() / wte.std()
        assert float(moved) == pytest.approx(0 if j in (0, 4) else 0.05, rel=0.05)
    distances = [float((a.weight - b.weight).abs().max()) for a in noisy.heads[1:4] for b in noisy.heads[5:]]
    assert min(distances) > 0  # no two heads got the same noise
    for mode in modes(noisy):
        difference = (noisy.log_probs(IDS, mode) - gpt2_log_probs).abs().max()
        assert LIMIT < float(difference) < 1


@torch.no_grad()
def test_default_noise_is_small_but_there(gpt2: DMPTForCausalLM, gpt2_log_probs: Tensor) -> None:
    model = init_from_gpt2(gpt2)
    assert model.config.head_allocation == {"left": [0, 1, 2, 3], "right": [4, 5, 6, 7]}
    difference = float((model.log_probs(IDS) - gpt2_log_probs).abs().max())
    assert LIMIT < difference < 0.05


def test_same_seed_same_bits_other_seed_others(gpt2: DMPTForCausalLM) -> None:
    a, b, c = (init_from_gpt2(gpt2, seed=seed).state_dict() for seed in (3, 3, 4))
    drawn = [name for name in a if name.endswith("weight") and name.startswith(("gates", "head_gates", "heads"))]
    assert all(torch.equal(a[name], b[name]) for name in a)
    different = {name for name in a if not torch.equal(a[name], c[name])}
    assert different == {name for name in drawn if name not in ("heads.0.weight", "heads.4.weight")}


def test_gates_start_left_and_head_gates_near_uniform(gpt2: DMPTForCausalLM) -> None:
    model = init_from_gpt2(gpt2, [1, 2], gate_bias=0.4, gate_hidden=24)
    for gate in model.gates.values():
        assert gate[2].bias.tolist() == pytest.approx([0.4, 0.0])  # (b, b) would favour nobody
        assert gate[0].weight.shape == (24, 32) and gate[2].weight.std().item() > 0
    with torch.no_grad():
        hidden = model.hidden(IDS)
        for leaf, h in hidden.leaves.items():
            pi = model.head_log_weights(leaf, h).exp()
            torch.testing.assert_close(pi, torch.full_like(pi, 1 / pi.shape[-1]), atol=0.05, rtol=0)


def test_paths_are_copies_that_share_no_memory(gpt2: DMPTForCausalLM) -> None:
    model = init_from_gpt2(gpt2, tie=False)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert {tensor.data_ptr() for tensor in gpt2.state_dict().values()}.isdisjoint(pointers)


def test_tie(gpt2: DMPTForCausalLM, make_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    assert init_from_gpt2(gpt2).heads[0].weight.shape == (300, 32)
    assert init_from_gpt2(gpt2).config.tie_word_embeddings
    assert not init_from_gpt2(gpt2, tie=False).config.tie_word_embeddings
    make_gpt2(tmp_path, tie_word_embeddings=False)
    untied = load_model(tmp_path)
    model = init_from_gpt2(untied, noise=0)
    assert torch.equal(model.heads[5].weight, untied.heads[0].weight)
    assert not torch.equal(model.heads[5].weight, untied.transformer.wte.weight)
    with pytest.raises(InputError, match="not tied"):
        init_from_gpt2(untied, tie=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"splits": [4]}, "do not fit 4 blocks"),
        ({"splits": [0]}, "do not fit 4 blocks"),
        ({"splits": [2, 2]}, "do not fit 4 blocks"),
        ({"splits": [3, 1]}, "do not fit 4 blocks"),
        ({"heads": 3}, "do not divide evenly"),
        ({"heads": 0}, "do not divide evenly"),
        ({"heads": -2}, "do not divide evenly"),
        ({"head_allocation": {"left": [0]}}, "head_allocation names leaves"),
        ({"head_allocation": {"left": [0], "right": [2]}}, "without a gap"),
        ({"head_allocation": {"left": [0], "right": []}}, "distinct head ids"),
        ({"fast_k": 301}, "fast_k 301"),
        ({"fast_k": 0}, "fast_k 0"),
        ({"head_topk": 5}, "head_topk 5"),
        ({"noise": -1.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"noise": float("inf")}, "noise"),
        ({"gate_hidden": 0}, "gate_hidden"),
    ],
)
def test_impossible_wishes(arguments: dict[str, Any], match: str, gpt2: DMPTForCausalLM) -> None:
    with pytest.raises(InputError, match=match):
        init_from_gpt2(gpt2, **arguments)


def test_only_from_a_model_without_splits_and_with_one_head(tiny_dmpt: Path, gpt2: DMPTForCausalLM) -> None:
    for model in (load_model(tiny_dmpt), init_from_gpt2(gpt2, [], heads=2)):
        with pytest.raises(InputError, match="already has splits"):
            init_from_gpt2(model)
    single = init_from_gpt2(gpt2, [], heads=1)
    assert init_from_gpt2(single).config.splits == [2]


def test_default_heads() -> None:
    assert [default_heads(n) for n in (1, 2, 4, 8, 16)] == [4, 8, 8, 8, 16]


# --- dmpt-export init -------------------------------------------------------------------------------


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_init_command(
    tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpt2_log_probs: Tensor
) -> None:
    out = tmp_path / "out"
    assert run("init", tiny_gpt2, out, "--splits", "1,2", "--heads", 8, "--fast-k", 20, "--head-topk", 1,
               "--noise", 0, "--seed", 9, "--gate-hidden", 8, "--gate-bias", 1.5) == 0  # fmt: skip
    shown = capsys.readouterr()
    assert shown.out == "" and "dmpt-export train" in shown.err
    model = load_model(out)
    config = model.config
    assert (config.splits, config.fast_k, config.head_topk, config.gate_hidden) == ([1, 2], 20, 1, 8)
    assert model.gates["left"][2].bias.tolist() == [1.5, 0.0]
    with torch.no_grad():
        torch.testing.assert_close(model.log_probs(IDS, fast_k=20), gpt2_log_probs, atol=LIMIT, rtol=0)
    assert (out / "tokenizer.json").read_bytes() == (tiny_gpt2 / "tokenizer.json").read_bytes()
    assert run("init", tiny_gpt2, out) == 0  # a checkpoint of ours may be replaced
    assert load_model(out).config.splits == [2]


@pytest.mark.parametrize(
    ("text", "splits"), [("", [2]), (" ", [2]), ("none", []), ("None", []), ("3", [3]), ("1, 3", [1, 3])]
)
def test_splits_option(text: str, splits: list[int], tiny_gpt2: Path, tmp_path: Path) -> None:
    assert run("init", tiny_gpt2, tmp_path / "out", "--splits", text) == 0
    assert load_state(tmp_path / "out")[0].splits == splits


def test_head_allocation_option(tiny_gpt2: Path, tmp_path: Path) -> None:
    allocation = {"right": [1, 2], "left": [0]}
    (tmp_path / "heads.json").write_text(json.dumps(allocation))
    assert run("init", tiny_gpt2, tmp_path / "out", "--head-allocation", tmp_path / "heads.json") == 0
    assert load_state(tmp_path / "out")[0].head_allocation == allocation


@pytest.mark.parametrize("content", ["[]", "{", '{"left": 0}', '{"left": ["0"]}', '{"left": [true]}', '{"left": null}'])
def test_damaged_head_allocation(content: str, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(InputError, match=r"heads\.json"):
        read_head_allocation(tmp_path / "heads.json")


BAD_INIT = [
    (["--splits", "9"], 3, "splits [9]"),
    (["--splits", "six"], 2, "'six'"),
    (["--splits", "1,,2"], 2, "'1,,2'"),
    (["--fast-k", "1000"], 3, "fast_k 1000"),
    (["--heads", "3"], 3, "3 heads"),
    (["--heads", "many"], 2, "many"),
    (["--heads", "2", "--head-allocation", "x.json"], 2, "exclude each other"),
    (["--head-allocation", "missing.json"], 3, "missing.json is missing"),
    (["--noise", "-1"], 2, "--noise"),
    (["--noise", "1e39"], 3, "NaN or infinity"),
    (["--gate-bias", "nan"], 2, "no finite number"),
    (["--heads", "1000000000000"], 5, "heads 1000000000000 needs"),
    (["--gate-hidden", "10000000000000000000"], 5, "gate_hidden"),
    (["--seed", "-1"], 2, "-1"),
    (["--nonsense"], 2, "nonsense"),
]


@pytest.mark.parametrize(("options", "code", "text"), BAD_INIT)
def test_bad_options(
    options: list[str], code: int, text: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("init", tiny_gpt2, tmp_path / "deep" / "out", *options) == code
    shown = capsys.readouterr()
    assert text in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert code == 2 or len(shown.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_empty_allocation_is_no_default(tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heads.json").write_text("{}")
    assert run("init", tiny_gpt2, tmp_path / "out", "--head-allocation", tmp_path / "heads.json") == 3
    assert "head_allocation names leaves []" in capsys.readouterr().err


def test_bad_folders(tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").touch()
    for source, out, text in (
        (tmp_path / "none", tmp_path / "out", "does not exist"),
        (notes, tmp_path / "out", "no config.json"),
        (tiny_gpt2, notes, "is not empty"),
        (tiny_gpt2, notes / "notes.txt", "is a file"),
        (tiny_gpt2, tiny_gpt2, "is not empty"),
    ):
        assert run("init", source, out) == 3
        assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "notes.txt"]


# --- the original's files ---------------------------------------------------------------------------

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
    """The names the original gives to the tensors of `model`, written down independently of training.original."""
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
    assert config.splits == model.config.splits and config.head_allocation == model.config.head_allocation
    again = load_model(out)
    with torch.no_grad():
        for mode in modes(model):
            assert torch.equal(again.log_probs(IDS, mode), model.log_probs(IDS, mode))


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


def save_dual(path: Path, **model_config: Any) -> DMPTForCausalLM:
    model = random_dmpt(**DUAL)
    torch.save({"model_state_dict": original_state(model, "dual"), "model_config": model_config}, path)
    return model


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
        assert text in told and text in card
    assert "--tokenizer" in told
    assert run("convert", tmp_path / "file.pt", tmp_path / "out", "--n-head", 8) == 0
    assert load_state(tmp_path / "out")[0].n_head == 8


def test_heads_that_were_not_mixed(tmp_path: Path) -> None:
    """Without --use_head_mixture the original scores left by head 0 and right by head 1, whatever else is there."""
    save_dual(tmp_path / "file.pt", use_head_mixture=False, head_allocation=None)
    checkpoint, notes = read_original(tmp_path / "file.pt")
    assert checkpoint.config.head_allocation == {"left": [0], "right": [1]}
    assert set(checkpoint.tensors) >= {"heads.0.weight", "heads.1.weight"}
    assert not any(name.startswith("head_gates") for name in checkpoint.tensors)
    assert any("3 heads belong to no leaf" in note for note in notes)


def test_heads_keep_their_leaf_when_ids_are_renumbered(tmp_path: Path) -> None:
    model = random_dmpt(splits=[2], head_allocation={"left": [0, 1], "right": [2, 3]})
    state = original_state(model, "dual")
    for new, old in ((7, 3), (5, 2), (3, 1)):  # original ids 0, 3, 5, 7; the others belong to nobody
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


def test_unmapped_tensors_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = original_state(random_dmpt(**DUAL), "dual")
    state |= {"adapter.weight": torch.zeros(2), "gate_2_left.0.weight": torch.zeros(2), "lm_head.bias": torch.zeros(2)}
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 3
    assert "no place in a DMPT: adapter.weight, gate_2_left.0.weight, lm_head.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    state = original_state(random_dmpt(**DUAL), "dual")
    del state["gate.2.bias"], state["right_path.1.ln_1.weight"]
    state["ln_f_left.bias"] = torch.zeros(3)
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    with pytest.raises(InputError) as caught:
        read_original(tmp_path / "file.pt")
    for name in ("gates.root.2.bias", "paths.right.h.3.ln_1.weight", "paths.left.ln_f.bias [3] instead of [64]"):
        assert name in str(caught.value)


def test_nan_names_the_tensor(tmp_path: Path) -> None:
    state = original_state(random_dmpt(**DUAL), "dual")
    state["left_path.0.mlp.c_fc.bias"][3] = torch.nan
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    with pytest.raises(InputError, match=r"'left_path\.0\.mlp\.c_fc\.bias' holds 1 NaN"):
        read_original(tmp_path / "file.pt")


class Payload:
    """What a hostile file would hold: code that runs while it is read."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (self.command,)


def test_payload_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "ran"
    state = original_state(random_dmpt(**DUAL), "dual")
    torch.save({"model_state_dict": state, "model_config": Payload(ran)}, tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 3
    told = capsys.readouterr().err
    assert "system" in told and "was not loaded" in told and len(told.splitlines()) == 1
    assert not ran.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)  # the payload is a real one
    assert ran.exists()


def test_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "file.pt").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(InputError, match="no PyTorch checkpoint"):
        read_original(tmp_path / "file.pt")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a list"),
        ({"model_state_dict": {}}, "no tensors"),
        ({"model_state_dict": 7}, "no tensors"),
        ({"other.weight": torch.zeros(2)}, "no embeddings"),
        ({"wte.weight": torch.zeros(2), "wpe.weight": torch.zeros(2, 2)}, "no embeddings"),
        ({"wte.weight": torch.zeros(9, 64), "wpe.weight": torch.zeros(8, 64)}, "no blocks"),
        ({"wte.weight": torch.zeros(9, 64), "wpe.weight": torch.zeros(8, 64),
          "shared_layers.0.ln_1.bias": torch.zeros(64)}, "no vocabulary heads"),
    ],
)  # fmt: skip
def test_foreign_files(content: Any, match: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(InputError, match=match) as caught:
        read_original(tmp_path / "file.pt")
    assert "file.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    save_dual(tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "file.pt").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"file\.pt"):
            read_original(tmp_path / "file.pt")
    with pytest.raises(InputError, match="does not exist"):
        read_original(tmp_path / "none.pt")
    with pytest.raises(InputError, match="does not exist or is no file"):
        read_original(tmp_path)


def test_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dual(tmp_path / "file.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match=r"2\.10"):
        read_original(tmp_path / "file.pt")


def test_undecidable_allocation_asks_for_the_file(tmp_path: Path) -> None:
    model = random_dmpt(**DUAL)
    state = original_state(model, "dual")
    state["lm_head.perceptrons.5.weight"] = torch.zeros(300, 64)
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="--head-allocation"):
        read_original(tmp_path / "file.pt")
    (tmp_path / "heads.json").write_text(json.dumps(DUAL["head_allocation"]))
    assert run("convert", tmp_path / "file.pt", tmp_path / "out", "--head-allocation", tmp_path / "heads.json") == 0
    same_model(model, tmp_path / "out")


def test_unknown_width_asks_for_the_attention_heads(tmp_path: Path) -> None:
    model = random_dmpt(**DUAL, n_embd=48, n_head=3)
    torch.save({"model_state_dict": original_state(model, "dual")}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="--n-head"):
        read_original(tmp_path / "file.pt")
    checkpoint, _ = read_original(tmp_path / "file.pt", n_head=3)
    assert checkpoint.config.n_head == 3


def test_wrong_tokenizer_is_refused_before_and_after(tmp_path: Path, tokenizer_folder: Path) -> None:
    save_dual(tmp_path / "file.pt")
    (tmp_path / "empty").mkdir()
    assert run("convert", tmp_path / "file.pt", tmp_path / "out", "--tokenizer", tmp_path / "empty") == 3
    small = random_dmpt(**DUAL, vocab_size=200)
    torch.save({"model_state_dict": original_state(small, "dual")}, tmp_path / "small.pt")
    assert run("convert", tmp_path / "small.pt", tmp_path / "out", "--tokenizer", tokenizer_folder) == 3
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "empty")
