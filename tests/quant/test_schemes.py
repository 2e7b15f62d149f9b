"""Accuracy of the schemes: invariants for any input, and the scale search against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant.schemes import SCHEMES
from quant.schemes.blockwise import CHUNK, int4, quantize
from training.errors import InputError

DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "laplace": lambda rng, size: rng.laplace(size=size),
    "student t3": lambda rng, size: rng.standard_t(3, size=size),
    "uniform": lambda rng, size: rng.uniform(-1, 1, size=size),
    "shifted": lambda rng, size: rng.normal(0.5, 1, size=size),
}


def brute_force(blocks: NDArray[np.float64], bits: int) -> float:
    """The least mean squared error of symmetric rounding: a dense grid of scales of both signs, then least squares."""
    half = 2 ** (bits - 1)
    top = np.abs(blocks).max(axis=1) / half
    best = np.full(len(blocks), np.inf)
    for ratio in np.concatenate([-np.linspace(0.4, 1.3, 91), np.linspace(0.4, 1.3, 91)]):
        codes = np.rint(blocks / (ratio * top)[:, None]).clip(-half, half - 1)
        scale = (blocks * codes).sum(axis=1) / (codes * codes).sum(axis=1)
        codes = np.rint(blocks / scale[:, None]).clip(-half, half - 1)
        best = np.minimum(best, np.square(blocks - codes * scale[:, None]).mean(axis=1))
    return float(best.mean())


@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_scales_of_few_bits_are_near_the_best_there_are(kind: str, bits: int) -> None:
    array = DISTRIBUTIONS[kind](np.random.default_rng(0), (64, 512)).astype(np.float32)
    for block in (32, 128):
        best = brute_force(array.reshape(-1, block).astype(np.float64), bits)
        error = float(np.square(quantize(array, bits, block).dequantize() - array).mean())
        assert error < 1.04 * best


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_int4_scales_are_near_the_best_there_are(kind: str, block: int) -> None:
    array = DISTRIBUTIONS[kind](np.random.default_rng(0), (64, 512)).astype(np.float32)
    best = brute_force(array.reshape(-1, block).astype(np.float64), 4)
    error = float(np.square(int4(array, block).dequantize() - array).mean())
    assert 0.995 * best < error < 1.02 * best  # ten times dearer a search would win at most these 2 %
    top = np.abs(array.reshape(-1, block)).max(axis=1, keepdims=True) / 7
    plain = float(np.square(np.rint(array.reshape(-1, block) / top) * top - array.reshape(-1, block)).mean())
    assert error < 0.9 * plain


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_points_help_weights_off_centre(bits: int) -> None:
    array = np.random.default_rng(0).normal(1, 0.5, (64, 256)).astype(np.float32)
    with_zero, without = (np.square(quantize(array, bits, 32, s).dequantize() - array).mean() for s in (False, True))
    assert with_zero < 0.7 * without


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    block=st.sampled_from([16, 32, 64, 128, 256]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)),
    symmetric=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_every_code_is_the_nearest_to_its_weight(
    bits: int, block: int, shape: tuple[int, int], symmetric: bool, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    array = (size * rng.standard_t(3, size=shape)).astype(np.float32)
    array[rng.random(shape) < 0.2] = 0
    tensor = quantize(array, bits, block, symmetric)
    columns = np.arange(shape[1]) // tensor.block
    scale = tensor.scales[:, columns].astype(np.float64)
    zero = tensor.offsets[:, columns].astype(np.float64)
    low = 2 ** (bits - 1) if symmetric else zero  # codes below zero; symmetric: stored around the field's middle
    reach = np.sort(np.stack([-low * scale, (2**bits - 1 - low) * scale]), axis=0)  # what the block can express
    nearest = array.clip(*reach)
    step = np.abs(scale) * (0.5 + 1e-5) + 1e-6 * np.abs(nearest)  # half a step, and float32 rounding of the quotient
    assert (np.abs(tensor.dequantize() - nearest) <= step).all()
    np.testing.assert_array_equal(tensor.dequantize()[array == 0], 0)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """More rows than one chunk holds: the seams must not show."""
    array = np.random.default_rng(0).normal(size=(3 * CHUNK // 96, 90)).astype(np.float32)
    whole = quantize(array, 4, 32, symmetric=False)
    for rows in (slice(0, 7), slice(CHUNK // 96 - 3, CHUNK // 96 + 3), slice(len(array) - 2, None)):
        alone = quantize(array[rows], 4, 32, symmetric=False)
        for part, values in alone.parts().items():
            np.testing.assert_array_equal(values, whole.parts()[part][rows])


def test_exact_integers_survive_int8_dynamic() -> None:
    array = np.random.default_rng(0).integers(-64, 65, (8, 50)).astype(np.float32)
    array[:, 0] = 64
    np.testing.assert_array_equal(SCHEMES["int8-dynamic"](array).dequantize(), array)


@given(data=st.data())
def test_products_of_int8_dynamic_never_saturate_on_older_processors(data: st.DataObject) -> None:
    """They add two products with activations from 0 to 255 in 16 bits (the instruction vpmaddubsw)."""
    values = st.floats(-(2**99), 2**99, width=32)
    array = np.array(data.draw(st.lists(st.lists(values, min_size=6, max_size=6), min_size=1, max_size=4)), np.float32)
    codes = SCHEMES["int8-dynamic"](array).packed.astype(np.int64)
    assert np.abs(255 * codes[:, ::2] + 255 * codes[:, 1::2]).max() <= np.iinfo(np.int16).max


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(scheme: str, bad: float) -> None:
    array = np.ones((4, 32), np.float32)
    array[2, 5] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        SCHEMES[scheme](array)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_no_matrix_is_refused(scheme: str) -> None:
    for array in (np.ones(4, np.float32), np.ones((2, 3, 4), np.float32), np.ones((0, 4), np.float32)):
        with pytest.raises(InputError, match="only a matrix"):
            SCHEMES[scheme](array)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_registry_and_the_tensor_agree(scheme: str) -> None:
    tensor = SCHEMES[scheme](np.ones((4, 300), np.float32))
    assert tensor.scheme == scheme
    assert type(tensor) is SCHEMES[scheme].form
