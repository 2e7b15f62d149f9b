"""Compare nanoGPT's ckpt.pt with a slow model of the same kind, written from its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dmpt_export.cli.main import main
from training.checkpoints.checkpoint import load_model
from training.checkpoints.original import read_original
from training.errors import InputError

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24}


def checkpoint(bias: bool, vocab: int = 300, wrapper: str = "", tied: bool = True) -> dict[str, Any]:
    """A checkpoint as its train.py saves it: linear weights are [out, in]."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    wide = SIZES["n_embd"]
    state = {"transformer.wte.weight": draw(vocab, wide), "transformer.wpe.weight": draw(SIZES["block_size"], wide)}
    for i in range(SIZES["n_layer"]):
        for name, out, into in (("attn.c_attn", 3 * wide, wide), ("attn.c_proj", wide, wide),
                                ("mlp.c_fc", 4 * wide, wide), ("mlp.c_proj", wide, 4 * wide)):  # fmt: skip
            state[f"transformer.h.{i}.{name}.weight"] = draw(out, into)
            if bias:
                state[f"transformer.h.{i}.{name}.bias"] = draw(out)
        for norm in (f"transformer.h.{i}.ln_1", f"transformer.h.{i}.ln_2"):
            state |= {f"{norm}.weight": 1 + draw(wide)} | ({f"{norm}.bias": draw(wide)} if bias else {})
    state |= {"transformer.ln_f.weight": 1 + draw(wide)} | ({"transformer.ln_f.bias": draw(wide)} if bias else {})
    state["lm_head.weight"] = state["transformer.wte.weight"] if tied else draw(vocab, wide)
    model_args = {**SIZES, "bias": bias, "vocab_size": vocab, "dropout": 0.0}
    return {
        "model": {wrapper + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": model_args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.2),
        "config": {"out_dir": "out", "learning_rate": 6e-4},
    }


def slow_log_probs(content: dict[str, Any], ids: list[int], wrapper: str = "") -> np.ndarray:
    """One position at a time, in float64."""
    state = {name.removeprefix(wrapper): tensor.double() for name, tensor in content["model"].items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        y = state[f"{name}.weight"] @ x
        return y + state.get(f"{name}.bias", torch.zeros(()))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        y = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return y * state[f"{name}.weight"] + state.get(f"{name}.bias", torch.zeros(()))

    n, width = SIZES["n_head"], SIZES["n_embd"] // SIZES["n_head"]
    rows = [state["transformer.wte.weight"][t] + state["transformer.wpe.weight"][i] for i, t in enumerate(ids)]
    for i in range(SIZES["n_layer"]):
        block = f"transformer.h.{i}"
        parts = [linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).split(SIZES["n_embd"]) for x in rows]
        for t, x in enumerate(rows):
            out = []
            for h in range(n):
                own = slice(h * width, (h + 1) * width)
                scores = torch.stack([parts[t][0][own] @ parts[s][1][own] / width**0.5 for s in range(t + 1)])
                weights = scores.softmax(0)
                out.append(sum(weights[s] * parts[s][2][own] for s in range(t + 1)))
            rows[t] = x + linear(f"{block}.attn.c_proj", torch.cat(out))
        for t, x in enumerate(rows):
            inner = F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x)))
            rows[t] = x + linear(f"{block}.mlp.c_proj", inner)
    logits = torch.stack([state["lm_head.weight"] @ norm("transformer.ln_f", x) for x in rows])
    found: np.ndarray = logits.log_softmax(-1).numpy()
    return found


@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_nanogpt_computes(bias: bool, tied: bool, wrapper: str, tmp_path: Path) -> None:
    content, ids = checkpoint(bias, wrapper=wrapper, tied=tied), [5, 6, 299, 0, 44, 44, 7]
    torch.save(content, tmp_path / "ckpt.pt")
    assert main(["convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")]) == 0
    model = load_model(tmp_path / "out")
    assert model.config.tie_word_embeddings == tied
    with torch.no_grad():
        found = model.log_probs(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(found, slow_log_probs(content, ids, wrapper), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("vocab", "end"), [(50304, 50256), (50257, 50256), (300, None)])
def test_gpt2_s_end_of_text_is_kept_in_its_padded_vocabulary(vocab: int, end: int | None, tmp_path: Path) -> None:
    torch.save(checkpoint(False, vocab), tmp_path / "ckpt.pt")
    config = read_original(tmp_path / "ckpt.pt")[0].config
    assert (config.vocab_size, config.eos_token_id) == (vocab, end)


@pytest.mark.parametrize(
    ("args", "match"),
    [({"n_head": None}, "model_args.n_head"), ({"n_layer": 3}, "transformer.h.2"), ({"block_size": 9}, "wpe.weight")],
)
def test_sizes_that_do_not_fit_are_named(args: dict[str, Any], match: str, tmp_path: Path) -> None:
    content = checkpoint(True)
    content["model_args"] |= args
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=match):
        read_original(tmp_path / "ckpt.pt")
