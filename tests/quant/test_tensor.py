"""Codes in bytes: integers worked out by hand, and the errors for damaged tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.forms.blockwise import BlockwiseTensor
from quant.forms.packing import fit_block, pack, unpack
from quant.forms.per_row import PerRowTensor
from quant.schemes import SCHEMES
from quant.schemes.blockwise import quantize
from training.errors import InputError


def test_four_bits_low_nibble_first() -> None:
    assert pack(np.array([1, 2, 15, 0], np.uint8), 4).tolist() == [0x21, 0x0F]


def test_two_bits_low_pair_first() -> None:
    assert pack(np.array([1, 2, 3, 0, 2], np.uint8), 2).tolist() == [0b00111001, 0b00000010]


def test_eight_bits_are_bytes() -> None:
    assert pack(np.array([0, 128, 255], np.uint8), 8).tolist() == [0, 128, 255]


def test_an_odd_count_is_filled_with_zero_bits() -> None:
    assert pack(np.array([[3, 9, 12], [1, 1, 1]], np.uint8), 4).tolist() == [[0x93, 0x0C], [0x11, 0x01]]


@settings(deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), length=st.integers(1, 37), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_unpack_undoes_pack(bits: int, length: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, length)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-length * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, length), codes)


def test_int4_symmetric_by_hand() -> None:
    # The largest value, -8, takes code 0 and sets the scale to 1; code 8 is zero; the block is 16 wide.
    row = [-8, -7, -1, 0, 1, 2, 3, 7, 0, 0, 0, 0, 0, 0, 0, 5]
    tensor = quantize(np.array([row], np.float32), 4, 16)
    assert tensor.scales.tolist() == [[1.0]]
    # codes 0 1 7 8 9 10 11 15 8 8 8 8 8 8 8 13
    assert tensor.packed.tolist() == [[[0x10, 0x87, 0xA9, 0xFB, 0x88, 0x88, 0x88, 0xD8]]]
    assert tensor.zero_points is None
    assert tensor.dequantize().tolist() == [row]


def test_int4_symmetric_gives_the_long_side_to_the_largest_value() -> None:
    # +8 is reached by a negative scale: code 0 stands for (0 - 8) * -1.
    row = [8, 7, 1, 0, -1, -7] + [0] * 10
    tensor = quantize(np.array([row], np.float32), 4, 16)
    assert tensor.scales.tolist() == [[-1.0]]
    assert tensor.packed[0, 0, :3].tolist() == [0x10, 0x87, 0xF9]
    assert tensor.dequantize().tolist() == [row]


def test_int4_asymmetric_by_hand() -> None:
    # From -3 to 12 in 15 steps of 1: zero is code 3. Two blocks put two zero points into one byte, 3 and 15.
    first = [-3, 12, 0, 1] + [0] * 12
    second = [-15, 0, -1, -14] + [0] * 12
    tensor = quantize(np.array([first + second], np.float32), 4, 16, symmetric=False)
    assert tensor.scales.tolist() == [[1.0, 1.0]]
    assert tensor.zero_points is not None
    assert tensor.zero_points.tolist() == [[0xF3]]
    assert tensor.offsets.tolist() == [[3, 15]]
    assert tensor.packed.tolist() == [[[0xF0, 0x43] + [0x33] * 6, [0xF0, 0x1E] + [0xFF] * 6]]
    assert tensor.dequantize().tolist() == [first + second]


def test_int2_symmetric_by_hand() -> None:
    # -2 takes code 0 and sets the scale to 1; code 2 is zero.
    row = [-2, -1, 0, 1, 1, 1, -2, -2] + [0] * 8
    tensor = quantize(np.array([row], np.float32), 2, 16)
    assert tensor.scales.tolist() == [[1.0]]
    # codes 0 1 2 3 | 3 3 0 0 | 2 2 2 2 | 2 2 2 2
    assert tensor.packed.tolist() == [[[0b11_10_01_00, 0b00_00_11_11, 0b10_10_10_10, 0b10_10_10_10]]]
    assert (tensor.bits, tensor.zero_points) == (2, None)
    assert tensor.dequantize().tolist() == [row]


def test_int2_asymmetric_by_hand() -> None:
    # From -1 to 2, from 0 to 3, from -3 to 0 and from -2 to 1: zero is code 1, 0, 3 and 2; four of them in a byte.
    rows = [[-1, 2, 0, 1, *[0] * 12], [0, 3, 1, 2, *[0] * 12], [-3, 0, -1, -2, *[0] * 12], [-2, 1, 0, -1, *[0] * 12]]
    row = np.array(rows, np.float32).reshape(1, 64)
    tensor = quantize(row, 2, 16, symmetric=False)
    assert tensor.scales.tolist() == [[1.0] * 4]
    assert tensor.zero_points is not None
    assert tensor.zero_points.tolist() == [[0b10_11_00_01]]
    assert tensor.packed[0, :, 0].tolist() == [0b10_01_11_00, 0b10_01_11_00, 0b01_10_11_00, 0b01_10_11_00]
    assert tensor.packed[0, :, 1:].tolist() == [[0b01010101] * 3, [0] * 3, [0xFF] * 3, [0b10101010] * 3]
    assert tensor.dequantize().tolist() == row.tolist()


def test_int3_symmetric_in_four_bits_by_hand() -> None:
    # -4 sets the scale to 1. Codes are stored around 8, which is what a 4-bit kernel takes off: 4..11 and no others.
    row = [-4, -3, 0, 1, 2, 3, -1, -2] + [0] * 8
    tensor = quantize(np.array([row], np.float32), 3, 16)
    assert (tensor.bits, tensor.zero_points, tensor.scales.tolist()) == (4, None, [[1.0]])
    # codes 4 5 8 9 10 11 7 6 8 8 8 8 8 8 8 8
    assert tensor.packed.tolist() == [[[0x54, 0x98, 0xBA, 0x67, 0x88, 0x88, 0x88, 0x88]]]
    assert tensor.dequantize().tolist() == [row]


def test_int3_asymmetric_in_four_bits_by_hand() -> None:
    # From -2 to 5 in 7 steps of 1: zero is code 2; from 0 to 7: code 0. Stored unchanged, 0..7.
    first, second = [-2, 5, 0, 1] + [0] * 12, [0, 7, 3, 1] + [0] * 12
    tensor = quantize(np.array([first + second], np.float32), 3, 16, symmetric=False)
    assert tensor.zero_points is not None
    assert (tensor.bits, tensor.scales.tolist(), tensor.zero_points.tolist()) == (4, [[1.0, 1.0]], [[0x02]])
    assert tensor.packed.tolist() == [[[0x70, 0x32] + [0x22] * 6, [0x70, 0x13] + [0x00] * 6]]
    assert tensor.dequantize().tolist() == [first + second]


def test_int8_symmetric_by_hand() -> None:
    row = [-128, 127, 0, 1, -1, 64] + [0] * 10
    tensor = quantize(np.array([row], np.float32), 8, 16)
    assert tensor.scales.tolist() == [[1.0]]
    assert tensor.packed.tolist() == [[[0, 255, 128, 129, 127, 192] + [128] * 10]]


def test_odd_width_is_padded_with_the_code_of_zero() -> None:
    # 21 weights in blocks of 16: the second block holds 5 weights and 11 paddings.
    row = [float(x) for x in range(-8, 8)] + [-8.0, 4.0, 2.0, 1.0, 7.0]
    for bits, zero in ((4, 0x88), (8, 128)):
        tensor = quantize(np.array([row], np.float32), bits, 16)
        assert tensor.packed.shape == (1, 2, 16 * bits // 8)
        assert tensor.packed[0, 1, 3 * bits // 4 :].tolist() == [zero] * (10 * bits // 8 if bits == 4 else 10)
        assert tensor.dequantize().shape == (1, 21)
    assert quantize(np.array([row], np.float32), 4, 16).packed[0, 1].tolist() == [0xC0, 0x9A, 0x8F, *[0x88] * 5]


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_all_zero_rows_stay_exactly_zero(scheme: str) -> None:
    array = np.zeros((3, 40), np.float32)
    array[1] = np.linspace(-1, 1, 40)
    tensor = SCHEMES[scheme](array)
    values = tensor.dequantize()
    assert not values[[0, 2]].any()
    if not isinstance(tensor, BlockwiseTensor | PerRowTensor):
        return
    assert not tensor.scales[[0, 2]].any()
    if isinstance(tensor, BlockwiseTensor):  # every code is the zero point
        codes = unpack(tensor.packed[[0, 2]], tensor.bits, tensor.block)
        assert (codes == tensor.offsets[[0, 2], :, None]).all()


@pytest.mark.usefixtures("bitsandbytes")
def test_values_too_small_for_a_scale_become_zero() -> None:
    for scheme in SCHEMES.values():
        assert not scheme(np.full((2, 32), 1e-42, np.float32)).dequantize().any()


def test_int8_dynamic_by_hand() -> None:
    tensor = SCHEMES["int8-dynamic"](np.array([[64, -64, 1.4, 0], [-2, 1, 0.6, 0]], np.float32))
    assert tensor.packed.dtype == np.int8
    assert tensor.packed.tolist() == [[64, -64, 1, 0], [-64, 32, 19, 0]]
    assert tensor.scales.tolist() == [1.0, 2 / 64]


@pytest.mark.parametrize(
    ("block", "width", "fitted"),
    [(128, 768, 128), (128, 100, 128), (128, 64, 64), (32, 20, 32), (128, 17, 32), (32, 3, 16), (16, 1, 16)],
)
def test_a_block_shrinks_to_cover_a_narrow_row(block: int, width: int, fitted: int) -> None:
    assert fit_block(block, width) == fitted


@pytest.mark.parametrize("block", [0, -16, 8, 24, 100, 512])
def test_a_block_no_kernel_takes_is_refused(block: int) -> None:
    with pytest.raises(InputError, match="power of two from 16 to 256"):
        quantize(np.ones((2, 512), np.float32), 4, block)


def test_transposed_gives_the_checkpoints_layout_and_rows_does_not() -> None:
    array = np.arange(32, dtype=np.float32).reshape(2, 16)
    tensor = quantize(array, 8, 16)
    turned = replace(tensor, transposed=True)
    np.testing.assert_array_equal(turned.dequantize(), tensor.dequantize().T)
    assert turned.dequantize().flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(turned.rows(np.array([1, 0, 1])), tensor.dequantize()[[1, 0, 1]])


def test_parts_that_do_not_fit_are_refused() -> None:
    good = quantize(np.ones((3, 64), np.float32), 4, 32, symmetric=False)
    wrong: list[dict[str, object]] = [
        {"packed": good.packed[:2]},
        {"packed": good.packed.astype(np.int16)},
        {"scales": good.scales.astype(np.float64)},
        {"scales": good.scales[:, :1]},
        {"zero_points": good.offsets},
        {"block": 64},
        {"bits": 8},
        {"bits": 3},
        {"shape": (3, 65)},
    ]
    for changes in wrong:
        with pytest.raises(InputError):
            replace(good, **changes)  # type: ignore[arg-type]


def test_sizes_count_every_stored_byte() -> None:
    array = np.ones((4, 64), np.float32)
    tensor = quantize(array, 4, 32, symmetric=False)  # 32 bytes of codes, 8 of scales, 1 of zero points a row
    assert tensor.nbytes == 4 * (32 + 8 + 1)
    assert isinstance(tensor, BlockwiseTensor)
    assert tensor.parts().keys() == {"packed", "scales", "zero_points"}
