"""Calibration text and the layers' inputs from it, from tokens to the folder's record; and unusable text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmpt_export.cli.main import main
from quant.calibration import LOOKED_UP, observe, perplexity, read_calibration, read_windows
from quant.checkpoint import load_weights, save_quantized
from quant.forms.blockwise import BlockwiseTensor
from quant.quantize import quantize_tensor
from quant.rules import EMBEDDING, Rule, is_quantizable
from tests.helpers.models import random_calibration, random_model, saved_model
from training.checkpoints.checkpoint import load_model, load_state, read_config
from training.errors import InputError

LINES = "the cat sat on the mat and looked at the rain .\n"


TREES: dict[str, dict[str, Any]] = {
    "gpt2": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4},
    "quad": {"splits": [1, 2], "heads": 4},
    "projected": {"splits": [2], "heads": 6, "head_kind": "projected", "head_rank": 5, "fast_k": 16},
    "one anchor": {
        "splits": [2],
        "heads": 6,
        "head_kind": "projected",
        "shared_anchor": True,
        "tie_word_embeddings": True,
    },
    "projected, shared": {
        "splits": [2],
        "heads": 2,
        "head_kind": "projected",
        "head_allocation": {"left": [0, 1], "right": [2, 1, 0]},
    },
    "shared heads": {"splits": [2], "heads": 2, "head_allocation": {"left": [0, 1], "right": [2, 0]}},
}


@pytest.mark.parametrize("name", TREES)
def test_inputs_are_what_the_model_multiplies(name: str) -> None:
    """Against a pass of the whole model with its own hooks, all rows kept."""
    model = random_model(**TREES[name])
    windows = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))
    names = {name for name in model.state_dict() if is_quantizable(name)}
    seen = {name: inputs for stage in observe(model, windows, names) for name, inputs in stage.items()}
    rows: dict[str, torch.Tensor] = {}

    def keep(layer: str) -> Callable[..., None]:
        return lambda _, args: rows.update({f"{layer}.weight": args[0].flatten(0, 1)})

    for layer, module in model.named_modules():
        if f"{layer}.weight" in names and ".h." in layer:
            module.register_forward_pre_hook(keep(layer))
    with torch.inference_mode():
        hidden = model.hidden(windows)
        routes = model.routes(hidden.gates) if hidden.gates else torch.zeros_like(windows)
    for i, (leaf, h) in enumerate(hidden.leaves.items()):
        for place, j in enumerate(model.config.head_allocation[leaf]):
            x = h[routes == i]
            used, move = [], x
            if j not in model.config.projected_heads:
                used.append((model.config.head_name(j), x))
            else:
                for name in model.config.projection_names(j):
                    used.append((name, move))
                    move = move @ model.state_dict()[name].T
                if place == 0 or not model.config.fast_k:  # it multiplies the whole matrix
                    used.append((model.config.head_name(model.config.matrix_of(leaf, j)), x + move))
            for name, its in used:
                rows[name] = torch.cat([rows[name], its]) if name in rows else its
    assert seen.keys() == rows.keys()
    for key, x in rows.items():
        want = (x.double().T @ x.double()).numpy()
        if key == EMBEDDING:
            want += LOOKED_UP * np.diag(want).mean() * np.eye(len(want))
        assert seen[key].count == len(x)
        np.testing.assert_allclose(seen[key].second_moment, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
        np.testing.assert_allclose(seen[key].largest, x.abs().amax(0).numpy(), rtol=1e-5)


def test_only_what_is_wanted_is_summed_up() -> None:
    model = random_model([2], 4)
    windows = torch.zeros(1, 8, dtype=torch.int64)
    wanted = {"paths.left.h.2.mlp.c_fc.weight", "heads.3.weight"}
    assert {name for stage in observe(model, windows, wanted) for name in stage} == wanted


def test_calibrated_tensors_get_their_own_inputs(tmp_path: Path) -> None:
    """In the folder: what quantize_tensor makes of each with the inputs of the float model."""
    source = saved_model(tmp_path / "source", [2], 4)
    calibration = random_calibration(source)
    save_quantized(source, tmp_path / "out", "int4-gptq", calibration=calibration)
    _, weights = load_weights(tmp_path / "out")
    _, arrays = load_state(source)
    names = {name for name, weight in weights.items() if isinstance(weight, BlockwiseTensor)}
    rule = Rule("*", "int4-gptq")
    plain = 0
    for stage in observe(load_model(source), calibration.windows, names):
        for name, inputs in stage.items():
            want, _ = quantize_tensor(name, arrays[name], rule, inputs)
            got = weights[name]
            assert isinstance(got, BlockwiseTensor)
            np.testing.assert_array_equal(got.packed, want.packed)
            plain += np.array_equal(got.packed, quantize_tensor(name, arrays[name], rule)[0].packed)
    assert plain == 0


# --- text -------------------------------------------------------------------------------------------


def text_file(folder: Path, lines: int = 400) -> Path:
    path = folder / "text.txt"
    path.write_text(LINES * lines, encoding="utf-8")
    return path


def test_windows_are_the_beginning_of_the_text(tiny_dmpt: Path, tmp_path: Path) -> None:
    config = read_config(tiny_dmpt)
    length = min(512, config.n_positions)
    windows = read_windows(text_file(tmp_path), tiny_dmpt, config, 3 * length + 5)
    assert windows.shape == (3, length)
    assert torch.equal(windows, read_windows(text_file(tmp_path), tiny_dmpt, config, 100 * length)[:3])


def test_perplexity_is_that_of_the_windows() -> None:
    model = random_model([2], 4, fast_k=9)
    windows = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        log_probs = model.log_probs(windows, fast_k=9)
    picked = log_probs[:, :-1].gather(2, windows[:, 1:, None])
    assert perplexity(model, windows) == pytest.approx(float((-picked.mean()).exp()), rel=1e-4)


def test_the_command_records_its_text(tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = text_file(tmp_path), tmp_path / "out"
    arguments = ["--scheme", "int4-gptq", "--calib", str(text), "--calib-tokens", "128", "--layer-bits", "heads.1=8"]
    assert main(["quantize", str(tiny_dmpt), str(out), *arguments]) == 0
    record = json.loads((out / "config.json").read_text())["quantization"]
    assert record["calibration"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["calibration"]["tokens"] == 128
    assert record["rules"][0]["scheme"] == "int8"
    calibration = read_calibration(text, tiny_dmpt, 128)
    assert record["calibration"]["perplexity"] == pytest.approx(calibration.perplexity)
    assert ("worse than guessing" in capsys.readouterr().err) == calibration.foreign


def test_foreign_text_is_told(tiny_dmpt: Path, tmp_path: Path) -> None:
    calibration = read_calibration(text_file(tmp_path), tiny_dmpt, 64)
    for ratio, foreign in ((0.9, False), (1.1, True)):
        object.__setattr__(calibration, "perplexity", ratio * calibration.vocab_size)
        assert calibration.foreign == foreign


@pytest.mark.parametrize(
    ("content", "tokens", "message"),
    [
        (LINES.encode(), "8192", "calibration needs"),
        (b"", "8192", "calibration needs|empty"),
        (b"\xff\xfe" * 50, "8192", "not UTF-8"),
        (None, "8192", "is not a file"),
        (LINES.encode() * 99, "1", "--calib-tokens"),
    ],
)
def test_text_that_cannot_be_used_is_one_line(
    content: bytes | None,
    tokens: str,
    message: str,
    tiny_dmpt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        text.write_bytes(content)
    arguments = ["--scheme", "int4-gptq", "--calib", str(text), "--calib-tokens", tokens]
    code = main(["quantize", str(tiny_dmpt), str(out), *arguments])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert code == (2 if tokens == "1" else 3)
    assert any(part in line for part in message.split("|"))
    assert not out.exists()


def test_too_few_tokens_are_refused(tiny_dmpt: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 calibration tokens are too few"):
        read_windows(text_file(tmp_path), tiny_dmpt, read_config(tiny_dmpt), 1)
