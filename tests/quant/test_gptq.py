"""GPTQ and HQQ against slow references and their own objectives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant.calibration import Inputs
from quant.forms.blockwise import BlockwiseTensor
from quant.schemes import SCHEMES, hqq
from quant.schemes.blockwise import quantize, search
from quant.schemes.gptq import DAMPING, ROWS, gptq, inverse_root
from training.errors import InputError

Matrix = NDArray[np.float32]


def seen(x: NDArray[np.float32]) -> Inputs:
    rows = x.astype(np.float64)
    return Inputs(len(x), rows.T @ rows, np.abs(x).max(axis=0))


def correlated(rng: np.random.Generator, n: int, k: int) -> NDArray[np.float32]:
    """Inputs like hidden states: some directions dominate, and so do some inputs."""
    mixed = rng.normal(size=(n, k // 4)) @ rng.normal(size=(k // 4, k)) + 0.3 * rng.normal(size=(n, k))
    return (mixed * rng.lognormal(0, 1, k)).astype(np.float32)


def loss(matrix: Matrix, tensor: BlockwiseTensor, inputs: Inputs) -> float:
    """The squared error of the products, in float64."""
    d = matrix.astype(np.float64) - tensor.dequantize()
    return float(np.einsum("ni,ij,nj->", d, inputs.second_moment, d))


def slowly(matrix: Matrix, bits: int, block: int, symmetric: bool, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ as derived in the paper, in float64: the inverse, and one elimination step for each input.

    Returns (dequantized [N, K], scales [N, blocks]).
    """
    n, k = matrix.shape
    h = inputs.second_moment + DAMPING * np.diag(inputs.second_moment).mean() * np.eye(k)
    inverse = np.linalg.inv(h)
    left = matrix.astype(np.float64)
    out, scales = np.empty((n, k)), []
    for j in range(k):
        if j % block == 0:
            group = np.zeros((n, block), np.float32)
            group[:, : min(block, k - j)] = left[:, j : j + block]
            scale, zero = (part.astype(np.float64) for part in search(group, bits, symmetric))
            scales.append(scale)
        codes = np.rint(left[:, j] / scale).clip(-zero, 2**bits - 1 - zero)
        out[:, j] = codes * scale
        left[:, j:] -= np.outer((left[:, j] - out[:, j]) / inverse[j, j], inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out, np.stack(scales, axis=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("n", "k", "block"), [(6, 96, 32), (3, 100, 16), (5, 24, 16), (2, 64, 128)])
def test_gptq_is_the_elimination_it_is_derived_from(n: int, k: int, block: int, bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(k + bits + 7)
    matrix = rng.normal(size=(n, k)).astype(np.float32)
    inputs = seen(correlated(rng, 3 * k, k))
    tensor = gptq(matrix, bits, block, symmetric, inputs)
    want, scales = slowly(matrix, bits, tensor.block, symmetric, inputs)
    np.testing.assert_allclose(tensor.scales, scales, rtol=1e-3)
    np.testing.assert_allclose(tensor.dequantize(), want, rtol=1e-3, atol=1e-6)  # a code too far would be a step off
    d = matrix - want
    assert loss(matrix, tensor, inputs) == pytest.approx(
        float(np.einsum("ni,ij,nj->", d, inputs.second_moment, d)), 1e-2
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_of_the_products_than_rounding_to_nearest(bits: int) -> None:
    rng = np.random.default_rng(bits)
    matrix, inputs = rng.normal(size=(40, 128)).astype(np.float32), seen(correlated(rng, 500, 128))
    plain, tuned = quantize(matrix, bits, 32), gptq(matrix, bits, 32, True, inputs)
    assert loss(matrix, tuned, inputs) < 0.5 * loss(matrix, plain, inputs)
    error = [float(np.square(tensor.dequantize() - matrix).sum()) for tensor in (plain, tuned)]
    assert error[0] < error[1]  # it is not the weights that come closer


@pytest.mark.parametrize("symmetric", [True, False])
def test_unrelated_inputs_leave_nothing_to_make_up_for(symmetric: bool) -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
    inputs = Inputs(9, 3 * np.eye(70), np.ones(70, np.float32))
    want = quantize(matrix, 4, 16, symmetric)
    for given_inputs in (inputs, None, Inputs(0, np.zeros((70, 70)), np.zeros(70, np.float32))):
        got = gptq(matrix, 4, 16, symmetric, given_inputs)
        assert got.parts().keys() == want.parts().keys()
        for part, array in got.parts().items():
            np.testing.assert_array_equal(array, want.parts()[part])


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """More rows than are taken at a time: the seam must not show."""
    rng = np.random.default_rng(0)
    matrix, inputs = rng.normal(size=(ROWS + 5, 32)).astype(np.float32), seen(correlated(rng, 200, 32))
    whole = gptq(matrix, 4, 16, True, inputs)
    alone = gptq(matrix[ROWS - 2 :], 4, 16, True, inputs)
    np.testing.assert_allclose(alone.dequantize(), whole.dequantize()[ROWS - 2 :], rtol=0, atol=1e-5)


def test_inputs_never_seen_and_seen_twice_are_no_obstacle() -> None:
    """Second moments without full rank: a dead input, two that are the same, fewer rows than inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 48)).astype(np.float32)
    x[:, 5], x[:, 9] = 0, x[:, 8]
    matrix = rng.normal(size=(4, 48)).astype(np.float32)
    tensor = gptq(matrix, 4, 16, True, seen(x))
    step = np.abs(tensor.scales).repeat(16, axis=1)
    assert (np.abs(tensor.dequantize() - matrix)[:, 5] <= 0.51 * step[:, 5]).all()  # nothing was moved there
    assert loss(matrix, tensor, seen(x)) < 0.3 * loss(matrix, quantize(matrix, 4, 16), seen(x))


def test_the_root_is_that_of_the_inverse() -> None:
    h = seen(correlated(np.random.default_rng(0), 90, 40)).second_moment
    root = inverse_root(h).astype(np.float64)
    assert (np.tril(root, -1) == 0).all()
    damped = h + DAMPING * np.diag(h).mean() * np.eye(40)
    np.testing.assert_allclose(root.T @ root @ damped, np.eye(40), atol=1e-4)


def test_inputs_of_another_matrix_are_refused() -> None:
    with pytest.raises(InputError, match="saw 8 inputs, the matrix has 16"):
        gptq(np.ones((2, 16), np.float32), 4, 16, True, seen(np.ones((3, 8), np.float32)))


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.calibrated])
def test_calibrated_schemes_use_their_inputs(scheme: str) -> None:
    rng = np.random.default_rng(0)
    matrix, inputs = rng.normal(size=(7, 64)).astype(np.float32), seen(correlated(rng, 200, 64))
    assert loss(matrix, SCHEMES[scheme](matrix, inputs=inputs), inputs) < loss(matrix, SCHEMES[scheme](matrix), inputs)


# --- HQQ ----------------------------------------------------------------------------------------------


def exact_objective(x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32]) -> np.ndarray:
    """sum |x - q|^P in float64, the nearest of all 16 codes tried one by one."""
    codes = np.arange(16)[None, None, :] - zero.astype(np.float64)[:, None, None]
    errors = np.abs(x.astype(np.float64)[:, :, None] - codes * scale.astype(np.float64)[:, None, None]).min(axis=2)
    return np.asarray((errors**hqq.P).sum(axis=1))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_hqq_improves_its_objective(size: float) -> None:
    x = (size * np.random.default_rng(0).standard_t(3, size=(200, 32))).astype(np.float32)
    before, after = exact_objective(x, *search(x, 4, False)), exact_objective(x, *hqq.fit(x))
    assert (after <= before * (1 + 1e-3)).all()
    assert after.sum() < 0.9995 * before.sum()


@settings(max_examples=30, deadline=None)
@given(error=st.floats(-1, 1), beta=st.floats(8, 20))
def test_the_threshold_stays_between_nothing_and_the_error(error: float, beta: float) -> None:
    e = float(hqq._shrink(np.array([error], np.float32), beta)[0])
    assert 0 <= e * np.sign(error) <= abs(error) + 1e-6
    if abs(error) ** (2 - hqq.P) < 0.99 / beta:
        assert e == 0


def test_hqq_leaves_exact_blocks_exact() -> None:
    x = np.random.default_rng(0).integers(-3, 13, (20, 32)).astype(np.float32)
    x[:, 0], x[:, 1] = -3, 12
    np.testing.assert_allclose(SCHEMES["int4-hqq"](x).dequantize(), x, atol=1e-5)
    assert not SCHEMES["int4-hqq"](np.zeros((2, 32), np.float32)).dequantize().any()
