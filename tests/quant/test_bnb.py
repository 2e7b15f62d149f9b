"""NF4, FP4, LLM.int8's weights and fp16: layout by hand, against bitsandbytes, on disk, and in the graph."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dmpt_export.onnx.export as export_module
from dmpt_export.check.float_kernels import graphs
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import dequantized_model, load_weights, save_quantized
from quant.forms.blockwise import BlockwiseTensor
from quant.forms.codebook import CODEBOOKS, CodebookTensor
from quant.forms.half import HalfTensor
from quant.reference import low_memory_model
from quant.rules import parse_rule
from quant.schemes import SCHEMES
from tests.helpers import fake_bitsandbytes
from tests.helpers.exports import TREES
from tests.helpers.graphs import rounding, run
from tests.helpers.models import saved_model
from training.errors import InputError, ValidationError

REAL = find_spec("bitsandbytes") is not None
NEW = ["nf4", "fp4", "bnb-int8", "fp16"]
pytestmark = pytest.mark.usefixtures("bitsandbytes")


# --- layout -----------------------------------------------------------------------------------------


def test_nf4_by_hand() -> None:
    """Blocks run on through rows: the second of these begins in the middle of row 1, and the first half of a byte."""
    packed = np.full(33, 0x77, np.uint8)  # all zero
    packed[0], packed[11], packed[16] = 0x0F, 0x7E, 0xF7  # values 0 and 1; 22 and 23; 32
    scales = np.array([2, 10, 1], np.float32)
    tensor = CodebookTensor(packed, scales, "nf4", 32, (3, 22))
    want = np.zeros((3, 22), np.float32)
    want[0, :2] = -2, 2
    want[1, 1] = 2 * 0.7229568
    want[1, 10] = 10
    np.testing.assert_allclose(tensor.rows(slice(None)), want, rtol=1e-6)
    np.testing.assert_array_equal(tensor.rows(np.array([2, 1])), tensor.rows(slice(None))[[2, 1]])
    assert tensor.nbytes == 33 + 12
    assert tensor.dequantize().shape == (3, 22)


def test_fp4_by_hand() -> None:
    """Patterns 0 to 15 in order: sign, two bits of exponent, one of mantissa."""
    packed = np.array([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], np.uint8)
    values = CodebookTensor(packed, np.array([12], np.float32), "fp4", 32, (1, 16)).dequantize()[0]
    np.testing.assert_allclose(values, [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], rtol=1e-6)


def test_bnb_int8_by_hand() -> None:
    """codes + 128, 127 for the row's largest; the row's scale once per block; an all-zero row stays zero."""
    array = np.zeros((2, 300), np.float32)
    array[0, :3] = 254, -254, 3.2
    tensor = SCHEMES["bnb-int8"](array)
    assert isinstance(tensor, BlockwiseTensor)
    assert tensor.block == 32
    assert tensor.zero_points is None
    assert tensor.packed[0, 0, :4].tolist() == [255, 1, 130, 128]
    assert set(tensor.packed[1].reshape(-1).tolist()) == {128}
    np.testing.assert_array_equal(tensor.scales, [[2.0] * 10, [0.0] * 10])
    np.testing.assert_array_equal(tensor.dequantize()[:, :4], [[254, -254, 4, 0], [0, 0, 0, 0]])


def test_fp16_is_the_nearest_half_and_refuses_what_has_none() -> None:
    array = np.array([[1 + 2**-12, 70000 - 5000, 1e-9]], np.float32)
    tensor = SCHEMES["fp16"](array)
    assert isinstance(tensor, HalfTensor)
    assert tensor.nbytes == 6
    np.testing.assert_array_equal(tensor.dequantize(), [[1, 64992, 0]])
    with pytest.raises(InputError, match="70000 is beyond float16"):
        SCHEMES["fp16"](np.full((2, 2), -70000, np.float32))


@pytest.mark.parametrize("scheme", CODEBOOKS)
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_every_weight_becomes_the_nearest_value_of_its_block(scheme: str, block: int) -> None:
    array = np.random.default_rng(block).normal(size=(7, 75)).astype(np.float32)
    tensor = SCHEMES[scheme](array, block=block)
    got, flat = tensor.dequantize().reshape(-1), array.reshape(-1)
    for start in range(0, flat.size, block):
        part = slice(start, start + block)
        values = fake_bitsandbytes.BOOKS[scheme] * np.abs(flat[part]).max()
        best = np.abs(flat[part, None] - values).min(axis=1)
        np.testing.assert_allclose(np.abs(got[part] - flat[part]), best, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not REAL, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("shape", [(8, 64), (5, 99), (3, 7)])
def test_our_reading_of_the_bytes_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    from bitsandbytes import functional

    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for scheme in CODEBOOKS:
        packed, state = functional.quantize_4bit(torch.from_numpy(array), blocksize=64, quant_type=scheme)
        want = functional.dequantize_4bit(packed, state).numpy()
        np.testing.assert_array_equal(SCHEMES[scheme](array).dequantize(), want)
        ours, theirs = fake_bitsandbytes.quantize_4bit(torch.from_numpy(array), 64, scheme)[0], packed
        assert (ours.numpy() != theirs.numpy()).mean() < 0.01  # ties between two values may fall either way
    codes, largest, _ = functional.int8_vectorwise_quant(torch.from_numpy(array))
    want = codes.numpy() * (largest.numpy() / np.float32(127))[:, None]
    np.testing.assert_allclose(SCHEMES["bnb-int8"](array).dequantize(), want, rtol=1e-6)


@pytest.mark.parametrize("scheme", CODEBOOKS)
@pytest.mark.parametrize("block", [32, 256])
def test_the_operator_multiplies_by_the_dequantized_matrix(scheme: str, block: int) -> None:
    for n, k in [(7, 64), (5, 100), (9, 33), (64, 256)]:
        rng = np.random.default_rng(n)
        tensor = SCHEMES[scheme](rng.normal(size=(n, k)).astype(np.float32), block=block)
        x = rng.normal(size=(3, k)).astype(np.float32)
        kind = {"fp4": 0, "nf4": 1}[scheme]
        y = run("MatMulBnb4", x, [tensor.packed, tensor.scales], N=n, K=k, block_size=block, quant_type=kind)
        matrix = tensor.rows(slice(None))
        assert (np.abs(y - x @ matrix.T) <= rounding(x, matrix)).all()


# --- the folder -------------------------------------------------------------------------------------


def test_a_folder_loads_and_exports_without_bitsandbytes(tmp_path: Path) -> None:
    """In a process where importing it fails; the stored bytes are the graph's bytes."""
    source = saved_model(tmp_path / "source", **TREES["dual, fast-k"])
    save_quantized(source, tmp_path / "nf4", "nf4")
    script = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from dmpt_export.onnx.export import export_onnx\n"
        f"export_onnx({str(tmp_path / 'nf4')!r}, {str(tmp_path / 'onnx')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    stored = load_file(tmp_path / "nf4" / "model.safetensors")
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    names = [name for name in stored if ".h." in name and name.endswith((".packed", ".scales"))]
    assert names
    assert all(np.array_equal(held[name], stored[name]) for name in names)


@pytest.mark.parametrize("scheme", NEW)
def test_both_torch_references_hold_the_same_weights(scheme: str, tmp_path: Path) -> None:
    save_quantized(saved_model(tmp_path / "source", **TREES["dual, fast-k"]), tmp_path / "out", scheme)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        whole, lean = (
            load(tmp_path / "out").log_probs(ids, fast_k=16) for load in (dequantized_model, low_memory_model)
        )
    torch.testing.assert_close(whole, lean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, t: e.update(block=48), "blocks of 32, 64, 128, 256, not 48"),
        (lambda e, t: e.update(block=32), r"scales is float32 \[48\] where float32 \[96\] is needed"),
        (lambda e, t: t.update(packed=t["packed"][:-1]), r"packed is uint8 \[1535\] where uint8 \[1536\]"),
        (lambda e, t: t.pop("scales"), "c_attn.weight.scales is missing"),
        (lambda e, t: e.update(scheme="fp16", bits=16), r"packed is uint8 \[1536\] where float16 \[96, 32\] is needed"),
        (lambda e, t: t.update(zero_points=t["packed"]), "neither float32 nor quantized"),
    ],
)
def test_damaged_parts_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    save_quantized(saved_model(tmp_path / "source", **TREES["gpt2"]), tmp_path / "out", "nf4")
    name, path = "transformer.h.0.attn.c_attn.weight", tmp_path / "out" / "config.json"
    fields, stored = json.loads(path.read_text()), load_file(tmp_path / "out" / "model.safetensors")
    parts = {part: stored.pop(f"{name}.{part}") for part in ("packed", "scales")}
    change(fields["quantization"]["tensors"][name], parts)
    path.write_text(json.dumps(fields))
    save_file(stored | {f"{name}.{part}": a for part, a in parts.items()}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_weights(tmp_path / "out")


# --- the graph --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", NEW)
@pytest.mark.parametrize("name", ["dual, fast-k", "shared heads", "odd sizes"])
def test_onnx_follows_torch_with_dequantized_weights(name: str, scheme: str, tmp_path: Path) -> None:
    save_quantized(saved_model(tmp_path / "source", **TREES[name]), tmp_path / "quantized", scheme)
    parity = export_onnx(tmp_path / "quantized", tmp_path / "onnx")["parity"]  # raises beyond the table
    assert ("float_kernels" in parity) == (scheme != "fp16")  # which has no integer kernels


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_with_float_rows_nothing_is_rounded(scheme: str, tmp_path: Path) -> None:
    rules = [parse_rule("transformer.wte=float32"), parse_rule("heads.*=fp16")]
    source = saved_model(tmp_path / "source", **TREES["dual, fast-k"])
    save_quantized(source, tmp_path / "quantized", scheme, rules=rules)
    parity = export_onnx(tmp_path / "quantized", tmp_path / "onnx")["parity"]
    assert parity["tolerance"]["max_abs"] == 1e-4
    assert "float_kernels" not in parity


def test_half_weights_are_stored_once_as_halves(tmp_path: Path) -> None:
    save_quantized(saved_model(tmp_path / "source", **TREES["shared heads"]), tmp_path / "quantized", "fp16")
    export_onnx(tmp_path / "quantized", tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    halves = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert "heads.2.weight" in halves
    assert len(set(halves)) == len(halves)
    assert not any(t.name.startswith("heads.2.weight.") for t in model.graph.initializer)
    ops = {node.op_type for graph in graphs(model.graph) for node in graph.node}
    assert "Cast" in ops


@pytest.mark.parametrize("scheme", NEW)
def test_a_wrong_scale_is_caught(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block's scale (or, without scales, one row of weights) off by a twentieth, in the graph alone."""
    save_quantized(saved_model(tmp_path / "source", **TREES["dual, fast-k"]), tmp_path / "quantized", scheme)

    def faulty(source: Path) -> Any:
        config, weights = load_weights(source)
        weight = weights["paths.left.h.2.mlp.c_fc.weight"]
        part = weight.packed if isinstance(weight, HalfTensor) else weight.scales  # type: ignore[union-attr]
        part[:3] = part[:3] * part.dtype.type(1.05)
        return config, weights

    monkeypatch.setattr(export_module, "load_weights", faulty)
    with pytest.raises(ValidationError):
        export_onnx(tmp_path / "quantized", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


# --- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--scheme", "nf4"], ["--scheme", "int8", "--rule", "*.c_fc=bnb-int8"]])
def test_without_bitsandbytes_one_line_says_how_to_get_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved_model(tmp_path / "source", **TREES["gpt2"])
    monkeypatch.setattr("quant.schemes.find_spec", lambda name: None)
    assert main(["quantize", str(source), str(tmp_path / "out"), *arguments]) == 3
    captured = capsys.readouterr()
    assert "pip install 'dmpt-export[bnb]'" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rows_cannot_be_nf4(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES["dual, fast-k"])
    with pytest.raises(InputError, match="whose rows are looked up"):
        save_quantized(source, tmp_path / "out", "int8", rules=[parse_rule("heads.1=nf4")])
    with pytest.raises(InputError, match="not 16"):
        save_quantized(source, tmp_path / "out", "nf4:16")
    shutil.rmtree(source)
