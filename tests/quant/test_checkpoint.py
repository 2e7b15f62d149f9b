"""The quantized folder: the same bits back, torch's reference, the command, and damaged or unsuitable input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dmpt_export.cli.main import main
from quant import checkpoint
from quant.checkpoint import dequantized_model, load_weights, save_quantized, write_quantized
from quant.forms.blockwise import BlockwiseTensor
from quant.quantize import quantize_tensor, quantize_tensors
from quant.rules import Rule, parse_rule
from quant.schemes import SCHEMES
from tests.helpers.models import random_calibration, saved_model
from training.checkpoints.checkpoint import load_model, load_state
from training.errors import InputError
from training.model.config import DMPTConfig

FILES = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def small(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_dmpt as int4, with one head kept at int8. Read-only."""
    out = tmp_path_factory.mktemp("quant") / "small"
    save_quantized(tiny_dmpt, out, "int4", rules=[parse_rule("heads.1=int8:16")])
    return out


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, whether float or quantized."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.tobytes() == b.tobytes() and a.shape == b.shape)
    fields = ("bits", "block", "shape", "scheme", "transposed")
    parts = {key: same(array, b.parts().get(key)) for key, array in a.parts().items()}
    return a.parts().keys() == b.parts().keys() and all(parts.values()) and all(
        getattr(a, field) == getattr(b, field) for field in fields
    )  # fmt: skip


@pytest.mark.usefixtures("bitsandbytes")
@settings(max_examples=16, deadline=None)
@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    block=st.sampled_from([None, 32, 128]),
    width=st.sampled_from([4, 24, 40]),
    vocab=st.integers(5, 40),
    symmetric=st.booleans(),
    tied=st.booleans(),
)
def test_a_folder_gives_back_the_same_bits(
    scheme: str, block: int | None, width: int, vocab: int, symmetric: bool, tied: bool, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("round")
    sizes = {"n_embd": width, "vocab_size": vocab, "n_layer": 2, "n_head": 2, "n_positions": 8}
    source = saved_model(folder / "source", [1], 2, tie_word_embeddings=tied, **sizes)
    config, arrays = load_state(source)
    rule = Rule("*", scheme, block if SCHEMES[scheme].blocks else None)
    chosen = {name: rule for name in arrays if name.startswith("heads") or name.endswith("c_fc.weight")}
    weights, _ = quantize_tensors(arrays, chosen)
    if SCHEMES[scheme].zero_points and not symmetric:  # a tensor with stored zero points
        head = next(w for name, w in weights.items() if name.startswith("heads") and isinstance(w, BlockwiseTensor))
        weights["heads.1.weight"] = SCHEMES[scheme](head.dequantize(), block=head.block, symmetric=False)
    write_quantized(folder / "out", config, weights, scheme, {"rules": [rule.as_dict()]})
    again, loaded = load_weights(folder / "out")
    assert loaded.keys() == weights.keys()
    assert all(same(weights[name], loaded[name]) for name in weights)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("model", ["tiny_dmpt", "tiny_quad", "tiny_gpt2"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.usefixtures("bitsandbytes")
def test_the_torch_reference_has_each_dequantized_weight(
    scheme: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(model)
    calibration = random_calibration(source) if SCHEMES[scheme].calibrated else None
    done = save_quantized(source, tmp_path / "out", scheme, calibration=calibration)
    reports = {report.name: report for report in done}
    _, weights = load_weights(tmp_path / "out")
    float_model, reference = load_model(source), dequantized_model(tmp_path / "out")
    assert not reference.training
    assert reports.keys() == weights.keys()
    expected = float_model.state_dict()
    for name, tensor in reference.state_dict().items():
        kept = "transformer.wte.weight" if name == "heads.0.weight" and name not in weights else name
        weight = weights[kept]
        if isinstance(weight, np.ndarray):
            assert torch.equal(tensor, expected[name])
            continue
        np.testing.assert_array_equal(tensor.numpy(), weight.dequantize())
        error = float((tensor - expected[name]).norm() / expected[name].norm())
        bits = 7 if scheme == "int8-dynamic" and ".h." in kept else SCHEMES[scheme].bits  # its codes end at 64
        assert 0 < error < {16: 0.001, 8: 0.01, 7: 0.02, 4: 0.15, 3: 0.3, 2: 0.6}[bits]
        assert reports[kept].relative_error == pytest.approx(error, rel=1e-4)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert not torch.equal(float_model.log_probs(ids), reference.log_probs(ids))


def test_a_float_checkpoint_is_read_as_it_is(tiny_dmpt: Path) -> None:
    config, weights = load_weights(tiny_dmpt)
    expected, arrays = load_state(tiny_dmpt)
    assert config.to_dict() == expected.to_dict()
    assert weights.keys() == arrays.keys()
    assert all(same(weights[name], arrays[name]) for name in arrays)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(dequantized_model(tiny_dmpt).log_probs(ids), load_model(tiny_dmpt).log_probs(ids))


def test_the_folder_records_what_was_done(small: Path) -> None:
    assert {path.name for path in small.iterdir()} >= FILES
    fields = json.loads((small / "config.json").read_text())
    record = fields["quantization"]
    assert fields["model_type"] == "dmpt"
    assert fields["fast_k"] == 16
    assert (record["scheme"], record["format_version"]) == ("int4", 1)
    assert record["rules"][0] == {"pattern": "heads.1", "scheme": "int8", "block": 16, "asymmetric": False}
    entry = {"scheme": "int8", "bits": 8, "block": 16, "shape": [300, 32], "transposed": False}
    assert record["tensors"]["heads.1.weight"] == entry
    entry = {"scheme": "int4", "bits": 4, "block": 32, "shape": [96, 32], "transposed": True}
    assert record["tensors"]["paths.left.h.2.attn.c_attn.weight"] == entry
    stored = load_file(small / "model.safetensors")
    assert "heads.1.weight" not in stored
    assert stored["heads.1.weight.packed"].shape == (300, 2, 16)
    assert "--scheme int4" in (small / "README.md").read_text()


def test_the_tied_embedding_is_stored_once(tiny_dmpt: Path, small: Path) -> None:
    assert load_model(tiny_dmpt).config.tie_word_embeddings
    stored = load_file(small / "model.safetensors")
    assert not [name for name in stored if name.startswith("heads.0")]
    model = dequantized_model(small)
    assert model.heads[0].weight is model.transformer.wte.weight


def test_reported_bytes_are_the_bytes_on_disk(tiny_dmpt: Path, tmp_path: Path) -> None:
    reports = save_quantized(tiny_dmpt, tmp_path / "out", "int4")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(report.bytes_after for report in reports) == sum(array.nbytes for array in stored.values())


# --- input that cannot be used ----------------------------------------------------------------------


def test_a_quantized_folder_is_not_quantized_again(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already quantized"):
        save_quantized(small, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_never_replaced(tiny_dmpt: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dmpt, tmp_path / "model")
    with pytest.raises(InputError, match="is not a dmpt-export quantized folder"):
        save_quantized(tmp_path / "model", tmp_path / "model", "int8")
    load_model(tmp_path / "model")


def test_an_older_quantized_folder_is_replaced(tiny_dmpt: Path, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "out")
    save_quantized(tiny_dmpt, tmp_path / "out", "int8")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["scheme"] == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rules_that_leave_nothing_to_quantize_are_refused(tiny_dmpt: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensor"):
        save_quantized(tiny_dmpt, tmp_path / "out", "int8", rules=[parse_rule("*=float32")])


def test_weights_that_are_no_numbers_are_named() -> None:
    array = np.ones((16, 32), np.float32)
    array[3, 4] = np.nan
    with pytest.raises(InputError, match=r"'heads\.3\.weight': the matrix holds NaN"):
        quantize_tensor("heads.3.weight", array, Rule("*", "int4"))


def test_a_failure_while_writing_leaves_nothing(tiny_dmpt: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "copy_tokenizer", full)
    with pytest.raises(OSError, match="No space"):
        save_quantized(tiny_dmpt, tmp_path / "out", "int8")
    assert not list(tmp_path.iterdir())


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        change(fields["quantization"])
        (folder / "config.json").write_text(json.dumps(fields))

    return damage


def change_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")

    return damage


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut, "damaged or cut short"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
    "newer format": (change_config(lambda q: q.update(format_version=2)), "format 2, this program reads 1"),
    "no table": (change_config(lambda q: q.pop("tensors")), "no table of tensors"),
    "no block": (change_config(lambda q: q["tensors"]["heads.1.weight"].pop("block")), r"heads\.1\.weight must give"),
    "text as bits": (change_config(lambda q: q["tensors"]["heads.1.weight"].update(bits="8")), "must give"),
    "bad shape": (change_config(lambda q: q["tensors"]["heads.1.weight"].update(shape=[300, 0])), "not two sizes"),
    "wrong bits": (
        change_config(lambda q: q["tensors"]["heads.1.weight"].update(bits=4)),
        r"heads\.1\.weight gives 4 bits, but int8 is stored in 8",
    ),
    "unknown scheme": (
        change_config(lambda q: q["tensors"]["heads.1.weight"].update(scheme="int5")),
        r"heads\.1\.weight names an unknown scheme 'int5'",
    ),
    "wrong layout": (  # of a square matrix, whose shape says nothing
        change_config(lambda q: q["tensors"]["transformer.h.0.attn.c_proj.weight"].update(transposed=False)),
        r"transformer\.h\.0\.attn\.c_proj\.weight gives transposed False",
    ),
    "wrong sizes": (
        change_config(lambda q: q["tensors"]["transformer.h.0.attn.c_attn.weight"].update(shape=[32, 96])),
        r"transformer\.h\.0\.attn\.c_attn\.weight: packed is uint8 \[96, 1, 16\]",
    ),
    "a vector's record": (
        change_config(lambda q: q["tensors"].update({"transformer.wpe.weight": q["tensors"]["heads.1.weight"]})),
        r"transformer\.wpe\.weight belongs to a tensor that always stays float32",
    ),
    "not in the table": (change_config(lambda q: q["tensors"].pop("heads.1.weight")), "neither float32 nor quantized"),
    "no scales": (change_tensors(lambda t: t.pop("heads.1.weight.scales")), r"heads\.1\.weight\.scales is missing"),
    "float twice": (
        change_tensors(lambda t: t.update({"heads.1.weight": np.ones((300, 32), np.float32)})),
        r"heads\.1\.weight both quantized and float",
    ),
    "foreign tensor": (change_tensors(lambda t: t.update(extra=np.ones(3, np.float32))), "unexpected: extra"),
    "lost tensor": (change_tensors(lambda t: t.pop("transformer.wpe.weight")), r"missing: transformer\.wpe\.weight"),
    "half precision": (
        change_tensors(lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].astype(np.float16)})),
        r"holds transformer\.wpe\.weight, neither float32",
    ),
    "not a number": (
        change_tensors(lambda t: t["heads.1.weight.scales"].__setitem__((7, 0), np.nan)),
        r"'heads\.1\.weight\.scales' holds NaN or infinite",
    ),
    "not finite": (
        change_tensors(lambda t: t["heads.1.weight.scales"].fill(np.inf)),
        r"'heads\.1\.weight\.scales' holds NaN or infinite",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(kind: str, small: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    shutil.copytree(small, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(InputError, match=message) as raised:
        load_weights(tmp_path / "damaged")
    assert "\n" not in str(raised.value)


# --- the command ------------------------------------------------------------------------------------


def test_the_command_prints_one_table(tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    code = main(
        ["quantize", str(tiny_dmpt), out, "--scheme", "int8-dynamic", "--block", "16", "--rule", "heads.3=int4"]
    )
    captured = capsys.readouterr()
    assert code == 0
    head, *rows = captured.out.splitlines()
    assert head.split("  ")[0] == "stored as"
    labels = [row.split("  ")[0] for row in rows]
    assert sorted(labels[:-1]) == ["float32", "int4 block 32", "int8 block 16", "int8-dynamic"]
    assert labels[-1] == "total"
    assert "heads.3.weight" in next(row for row in rows if row.startswith("int4"))
    _, weights = load_weights(out)
    total = sum(w.nbytes for w in weights.values())
    assert f"{total / 1e6:.2f}" in rows[-1]
    assert str(len(weights)) in rows[-1].split()
    assert "dmpt-export onnx" in captured.err


def test_a_gpt2_folder_is_taken_as_it_is(tiny_gpt2: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(tiny_gpt2), str(tmp_path / "out"), "--scheme", "int4"]) == 0
    config, weights = load_weights(tmp_path / "out")
    assert isinstance(config, DMPTConfig)
    assert config.splits == []
    assert sum(isinstance(weight, BlockwiseTensor) for weight in weights.values()) == 4 * 4 + 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{model}", "{out}"], 2, "give --scheme, or a target"),
        (["{model}", "{out}", "--scheme", "int5"], 2, "'int5' is not one of int8, int8-dynamic, int4"),
        (["{model}", "{out}", "--scheme", "int4", "--block", "24"], 2, "'24' is not one of"),
        (["{model}", "{out}", "--scheme", "int4", "--rule", "x=int4"], 3, "Error: rule 'x=int4' matches no tensor"),
        (["{model}", "{out}", "--scheme", "int4", "--rule", "heads.1"], 2, "is not of the form"),
        (["{model}", "{out}", "--scheme", "int4-gptq"], 2, "int4-gptq (for heads.1.weight) needs calibration text"),
        (["{model}", "{out}", "--scheme", "int8", "--layer-bits", "heads.1=5"], 2, "no scheme has 5 bits"),
        (["{model}", "{out}", "--scheme", "int2", "--block", "256"], 2, "blocks from 32 to 128 only"),
        (["{model}", "{out}", "--scheme", "int8", "--smooth", "0.5"], 2, "smoothing is for int8-dynamic"),
        (["{model}", "{out}", "--scheme", "int8-dynamic", "--smooth", "2"], 2, "--smooth"),
        (["{small}", "{out}", "--scheme", "int4-gptq", "--calib", "x.txt"], 3, "already quantized"),
        (["{model}-absent", "{out}", "--scheme", "int4"], 3, "does not exist"),
        (["{small}", "{out}", "--scheme", "int4"], 3, "already quantized"),
        (["{model}", "{model}", "--scheme", "int4"], 3, "is not a dmpt-export quantized folder"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tiny_dmpt: Path,
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"model": tiny_dmpt, "small": small, "out": tmp_path / "out"}
    assert main(["quantize", *(argument.format(**places) for argument in arguments)]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    if code == 3:
        assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(scheme in text for scheme in SCHEMES)
    assert "Example" in text
    assert "dmpt-export onnx" in text
