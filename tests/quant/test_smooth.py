"""Balancing: the float model stays equal, and rounding it in int8 loses less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quant.calibration import Calibration, observe, watching
from quant.checkpoint import load_weights, save_quantized
from quant.rules import is_transposed
from quant.schemes import SCHEMES
from quant.smooth import smooth
from tests.helpers.models import random_model, saved_model
from tests.helpers.tolerances import TOLERANCE
from training.checkpoints.checkpoint import load_state, model_from_tensors
from training.errors import InputError
from training.model.generation import DMPTForCausalLM

WINDOWS = torch.from_numpy(np.random.default_rng(3).integers(0, 97, (4, 32)))


def outliers(model: DMPTForCausalLM) -> DMPTForCausalLM:
    """A few inputs of each layer far larger than the rest, as trained models have them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_1.weight" in name or ".ln_2.weight" in name:
                parameter[:2] *= 30
            if ".attn.c_attn.weight" in name or ".mlp.c_fc.weight" in name:
                parameter[:2] /= 30
    return model


def largest(model: DMPTForCausalLM) -> dict[str, np.ndarray]:
    names = {name for name in model.state_dict() if is_transposed(name)}
    return {name: seen.largest for stage in observe(model, WINDOWS, names) for name, seen in stage.items()}


@pytest.mark.parametrize("splits", [[], [2], [1, 2]])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_float_model_stays_the_same(splits: list[int], alpha: float) -> None:
    model = outliers(random_model(splits, max(1, 2 ** len(splits))))
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    balanced = smooth(arrays, largest(model), alpha)
    changed = {name for name in arrays if not np.array_equal(arrays[name], balanced[name])}
    parts = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_attn.weight", "attn.c_attn.bias",
             "attn.c_proj.weight", "mlp.c_fc.weight")  # fmt: skip
    assert changed == {name for name in arrays if ".h." in name and name.endswith(parts)}
    other = model_from_tensors(model.config, {name: torch.from_numpy(array) for name, array in balanced.items()})
    with torch.inference_mode():
        want, got = model.log_probs(WINDOWS), other.log_probs(WINDOWS)
        for turn, other_turn in zip(
            model.hidden(WINDOWS).gates.values(), other.hidden(WINDOWS).gates.values(), strict=True
        ):
            assert torch.equal(turn.argmax(-1), other_turn.argmax(-1))
    torch.testing.assert_close(got, want, rtol=0, atol=10 * TOLERANCE["float32", "torch"])


def test_half_way_the_largest_inputs_and_weights_are_alike() -> None:
    """alpha 0.5: s_j = sqrt(max|x_j| / max|w_j|), so both end at the root of their product (up to a common factor)."""
    model = outliers(random_model([], 1))
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    peaks = {"transformer.h.1.mlp.c_fc.weight": largest(model)["transformer.h.1.mlp.c_fc.weight"]}
    balanced = smooth(arrays, peaks, 0.5)
    ((name, x),) = peaks.items()
    s = arrays["transformer.h.1.ln_2.weight"] / balanced["transformer.h.1.ln_2.weight"]
    ratio = (x / s) / np.abs(balanced[name]).max(axis=1)
    np.testing.assert_allclose(ratio, np.full_like(ratio, np.median(ratio)), rtol=1e-4)
    assert np.abs(x / s).max() / np.median(x / s) < 0.3 * np.abs(x).max() / np.median(x)


def w8a8_error(x: np.ndarray, matrix: np.ndarray) -> float:
    """Relative error of products when all of x [n, K] shares an 8-bit scale, as each row of `matrix` [N, K] does."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    rounded = ((np.rint(x / step) + zero).clip(0, 255) - zero) * step
    want = x @ matrix.T
    return float(np.linalg.norm(rounded @ SCHEMES["int8-dynamic"](matrix).dequantize().T - want) / np.linalg.norm(want))


def test_outliers_cost_less_when_they_are_balanced() -> None:
    model = outliers(random_model([2], 4))
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    balanced = smooth(arrays, largest(model))
    other = model_from_tensors(model.config, {name: torch.from_numpy(array) for name, array in balanced.items()})
    errors = []
    for one in (model, other):
        rows: dict[str, np.ndarray] = {}
        with watching(one, "", lambda name, x, rows=rows: rows.update({name: x.numpy()})), torch.inference_mode():  # type: ignore[misc]
            one.hidden(WINDOWS)
        state = {name: np.ascontiguousarray(one.state_dict()[name].numpy().T) for name in rows}
        errors.append({name: w8a8_error(x, state[name]) for name, x in rows.items()})
    for name in errors[0]:
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            assert errors[1][name] < 0.5 * errors[0][name]


def test_inputs_that_are_always_zero_are_left_alone() -> None:
    model = random_model([], 1)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    peak = largest(model)["transformer.h.0.mlp.c_fc.weight"].copy()
    peak[3] = 0
    balanced = smooth(arrays, {"transformer.h.0.mlp.c_fc.weight": peak})
    np.testing.assert_array_equal(
        balanced["transformer.h.0.mlp.c_fc.weight"][3], arrays["transformer.h.0.mlp.c_fc.weight"][3]
    )
    assert all(np.isfinite(array).all() for array in balanced.values())
    untouched = smooth(arrays, {"transformer.h.0.mlp.c_fc.weight": np.zeros_like(peak)})
    assert all(np.array_equal(untouched[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_impossible_amounts_are_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="must be from 0"):
        smooth({}, {}, alpha)


def test_a_folder_is_smoothed_where_it_is_int8_dynamic(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [2], 2)
    calibration = Calibration(WINDOWS, "0" * 64, 50.0, 97)
    save_quantized(source, tmp_path / "out", "int8-dynamic", calibration=calibration, smooth=0.5)
    _, weights = load_weights(tmp_path / "out")
    _, arrays = load_state(source)
    assert not np.array_equal(weights["paths.left.h.2.ln_1.weight"], arrays["paths.left.h.2.ln_1.weight"])
    assert np.array_equal(weights["paths.left.ln_f.weight"], arrays["paths.left.ln_f.weight"])
    with pytest.raises(InputError, match="no tensor gets"):
        save_quantized(source, tmp_path / "other", "int8", calibration=calibration, smooth=0.5)
    with pytest.raises(InputError, match="give some with calib"):
        save_quantized(source, tmp_path / "other", "int8-dynamic", smooth=0.5)
