"""Refused checkpoint folders: not a model folder, impossible configurations, damaged weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.checkpoints import edit_config, edit_tensors, one_line
from tests.helpers.models import saved_model
from training.checkpoints.checkpoint import load_model, load_state, read_config
from training.checkpoints.files import resolve


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_kind": "small"}, "head_kind 'small' must be one of full, projected"),
        ({"head_kind": 3}, "head_kind must be a name, not 3"),
        ({"head_kind": "projected", "head_rank": 0}, "head_rank must be a whole number from 1"),
        ({"head_kind": "projected", "head_rank": 33}, "head_rank 33 must be from 1 to n_embd"),
        ({"head_kind": "projected", "shared_anchor": "yes"}, "shared_anchor must be true or false"),
        ({"shared_anchor": True}, "head_rank and shared_anchor need head_kind projected"),
        ({"head_kind": "projected"}, r"missing: heads\.1\.projection\.weight.*unexpected: heads\.1\.weight"),
    ],
)
def test_kinds_of_heads_that_do_not_fit(change: dict[str, Any], said: str, dmpt_copy: Path) -> None:
    edit_config(dmpt_copy, **change)
    with one_line(said):
        load_model(dmpt_copy)


def test_a_projection_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", [2], 4, head_kind="projected", head_rank=5)
    edit_tensors(folder, lambda tensors: tensors.update({"heads.3.projection.up.weight": torch.zeros(32, 6)}))
    with one_line(r"wrong shape: heads\.3\.projection\.up\.weight \[32, 6\] instead of \[32, 5\]"):
        load_model(folder)


def test_a_config_from_before_projected_heads_has_full_ones(dmpt_copy: Path) -> None:
    fields = json.loads((dmpt_copy / "config.json").read_text())
    for name in ("head_kind", "head_rank", "shared_anchor"):
        fields.pop(name)
    (dmpt_copy / "config.json").write_text(json.dumps(fields))
    assert load_model(dmpt_copy).config.projected_heads == []


# --- wrong folders ----------------------------------------------------------------------------------


def test_missing_and_foreign_folders(tmp_path: Path, tiny_gpt2: Path) -> None:
    with one_line("does not exist", "nowhere"):
        load_model(tmp_path / "nowhere")
    with one_line("does not exist"):
        load_model("./nowhere/at/all")
    with one_line("no config.json"):
        load_model(tmp_path)
    with one_line("is a file"):
        load_model(tiny_gpt2 / "config.json")
    (tmp_path / "old.pt").touch()
    with one_line("dmpt-export convert"):
        load_model(tmp_path / "old.pt")
    (tmp_path / "dmpt_manifest.json").touch()
    with one_line("exported model"):
        load_model(tmp_path)


def test_hub_id_offline_is_one_clear_error() -> None:
    with one_line("there is no folder 'someone/some-model'.*hub"):
        load_model("someone/some-model")


def test_hub_id_is_looked_up_after_folders(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_gpt2)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2") == tiny_gpt2
    assert asked[0][0] == "gpt2"
    assert "model*.safetensors" in asked[0][1]
    assert not any(".bin" in pattern for pattern in asked[0][1])
    Path("gpt2").mkdir()
    assert resolve("gpt2") == Path("gpt2")
    assert len(asked) == 1


def test_refused_hub_id_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, allow_patterns: list[str]) -> str:
        raise OSError("401 Client Error\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with one_line("does not provide.*401 Client Error"):
        resolve("private/model")


def test_pickled_weights_are_refused_with_the_way_out(gpt2_copy: Path) -> None:
    (gpt2_copy / "model.safetensors").unlink()
    with one_line("no model.safetensors"):
        load_model(gpt2_copy)
    (gpt2_copy / "pytorch_model.bin").write_bytes(b"whatever")
    with one_line("pickled weights.*save_pretrained"):
        load_model(gpt2_copy)


def test_quantized_folder_points_to_its_reader(dmpt_copy: Path) -> None:
    edit_config(dmpt_copy, quantization={"scheme": "int8"})
    assert read_config(dmpt_copy).quantization == {"scheme": "int8"}
    for load in (load_model, load_state):
        with one_line("quant.checkpoint.dequantized_model", str(dmpt_copy)):
            load(dmpt_copy)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"n_embd": "wide"}, "n_embd must be a whole number"),
        ({"n_layer": 0}, "n_layer must be a whole number"),
        ({"vocab_size": 3.5}, "vocab_size must be a whole number"),
        ({"n_head": 5}, "not a multiple of n_head"),
        ({"activation_function": "relu"}, "activation_function 'relu' is not supported: it must be one of gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by another tool"),
        ({"n_layer": 10**7}, "there are only"),
        ({"vocab_size": 10**7}, "wrong shape: transformer.wte.weight"),
        ({"n_embd": 10**12}, "n_embd must be a whole number from 1 to"),
        ({"n_positions": 10**18}, "n_positions must be a whole number"),
        ({"n_inner": "wide"}, "n_inner must be a whole number"),
        ({"n_inner": -1}, "n_inner must be a whole number"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon must be a number above 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": ["0"]}, "eos_token_id must be a token id"),
        ({"n_layer": 3}, "unexpected: transformer.h.3.attn.c_attn.bias"),
    ],
)
def test_gpt2_config_that_cannot_be(changes: dict[str, Any], match: str, gpt2_copy: Path) -> None:
    edit_config(gpt2_copy, **changes)
    with one_line(match, str(gpt2_copy)):
        load_model(gpt2_copy)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"splits": [9]}, "splits"),
        ({"splits": "two"}, "splits must be a list"),
        ({"splits": 2}, "splits must be a list"),
        ({"splits": [1.5]}, "splits must be a list of whole numbers"),
        ({"head_allocation": {}}, "head_allocation names leaves"),
        ({"fast_k": True}, "fast_k must be a whole number"),
        ({"fast_k": 1.5}, "fast_k must be a whole number"),
        ({"gate_temp": float("nan")}, "gate_temp must be a number"),
        ({"head_gate_temp": float("inf")}, "head_gate_temp must be a number"),
        ({"eos_token_id": 300}, "eos_token_id must be a token id from 0 to 299"),
        ({"head_allocation": {"left": [0]}}, "head_allocation"),
        ({"head_allocation": [0, 1]}, "cannot be used|head_allocation"),
        ({"fast_k": 301}, "fast_k 301"),
        ({"gate_hidden": -1}, "gate_hidden must be a whole number"),
    ],
)
def test_dmpt_config_that_cannot_be(changes: dict[str, Any], match: str, dmpt_copy: Path) -> None:
    edit_config(dmpt_copy, **changes)
    with one_line(match, str(dmpt_copy)):
        load_model(dmpt_copy)


@pytest.mark.parametrize("given", [{"eos_token_id": 50256, "bos_token_id": 50256}, {}])
def test_end_of_text_that_a_small_gpt2_inherited_is_its_tokenizers(given: dict[str, int], gpt2_copy: Path) -> None:
    path = gpt2_copy / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if not k.endswith("_token_id")} | given))
    config = read_config(gpt2_copy)
    assert config.eos_token_id == 0
    assert config.bos_token_id is None


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", "[" * 100_000])
def test_damaged_config_file(content: str, gpt2_copy: Path) -> None:
    (gpt2_copy / "config.json").write_text(content, encoding="latin-1")
    with one_line("JSON", str(gpt2_copy / "config.json")):
        load_model(gpt2_copy)


# --- damaged weights --------------------------------------------------------------------------------


def write_raw(folder: Path, header: dict[str, Any] | bytes, body: bytes, claim: int | None = None) -> None:
    """A safetensors file by hand: 8 bytes of header length, the JSON header, the tensors' bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if claim is None else claim
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + raw + body)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DAMAGE: dict[str, tuple[dict[str, Any] | bytes, bytes, int | None]] = {
    "header over 100 MB": (b"{}", b"", 100_000_001),
    "header longer than the file": (b"{}", b"", 50),
    "header that is not JSON": (b"{nope", b"", None),
    "header that is not UTF-8": (b"\xff\xfe\xfd\xfc", b"", None),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), None),
    "hole": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20), None),
    "bytes after the last tensor": ({"a": entry(0, 8, [2])}, bytes(12), None),
    "bytes missing": ({"a": entry(0, 8, [2])}, bytes(4), None),
    "size other than shape times type": ({"a": entry(0, 8, [3])}, bytes(8), None),
    "offsets backwards": ({"a": entry(8, 0, [2])}, bytes(8), None),
    "shape that overflows": ({"a": entry(0, 8, [2**62, 2**62])}, bytes(8), None),
    "unknown type": ({"a": entry(0, 8, [2], "F7")}, bytes(8), None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_safetensors_is_one_clear_error(damage: str, gpt2_copy: Path) -> None:
    write_raw(gpt2_copy, *DAMAGE[damage])
    with one_line("is damaged or cut short", str(gpt2_copy / "model.safetensors")):
        load_model(gpt2_copy)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_cut_safetensors_is_one_clear_error(keep: int, gpt2_copy: Path) -> None:
    path = gpt2_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with one_line("is damaged or cut short", str(path)):
        load_model(gpt2_copy)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(gpt2_copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.h.1.ln_1.weight"], tensors["transformer.wpe.weight"]
        tensors["transformer.score.weight"] = torch.zeros(2)
        tensors["extra"] = torch.zeros(2)
        tensors["transformer.ln_f.bias"] = torch.zeros(31)

    edit_tensors(gpt2_copy, spoil)
    with one_line(
        "missing: transformer.h.1.ln_1.weight, transformer.wpe.weight; "
        "unexpected: transformer.extra, transformer.score.weight; "
        r"wrong shape: transformer.ln_f.bias \[31\] instead of \[32\]"
    ):
        load_model(gpt2_copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_tensor(value: float, dmpt_copy: Path) -> None:
    edit_tensors(dmpt_copy, lambda tensors: tensors["paths.left.h.3.mlp.c_fc.weight"][5, 7:9].fill_(value))
    with one_line("'paths.left.h.3.mlp.c_fc.weight' holds 2 NaN or infinite"):
        load_model(dmpt_copy)


def test_large_values_are_not_taken_for_infinity(gpt2_copy: Path) -> None:
    edit_tensors(gpt2_copy, lambda tensors: tensors["transformer.wte.weight"].fill_(3e38))  # their sum overflows
    assert load_state(gpt2_copy)[1]["transformer.wte.weight"].max() == np.float32(3e38)


def test_overflow_of_a_double_is_infinity_too(gpt2_copy: Path) -> None:
    edit_tensors(
        gpt2_copy, lambda t: t.update({"transformer.ln_f.bias": torch.full((32,), 1e300, dtype=torch.float64)})
    )
    with one_line("'transformer.ln_f.bias' holds 32 NaN or infinite"):
        load_model(gpt2_copy)


def test_integers_are_no_weights(gpt2_copy: Path) -> None:
    edit_tensors(gpt2_copy, lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}))
    with one_line("'transformer.ln_f.bias' is int8, floats are expected"):
        load_model(gpt2_copy)


def test_one_tensor_under_two_names_is_refused(gpt2_copy: Path) -> None:
    edit_tensors(gpt2_copy, lambda t: t.update({"ln_f.bias": torch.zeros(32)}))
    with one_line("'transformer.ln_f.bias' twice"):
        load_model(gpt2_copy)


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "../gpt2/model-1.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": "..\\model.safetensors"}, "outside its folder"),
        ({"a": ".."}, "outside its folder|is missing"),
        ({"a": 7}, "outside its folder"),
        ({"a": "model-2.safetensors"}, "is missing"),
        ({"a": "model-1.safetensors"}, "lacks a"),
        ({}, "no weight_map"),
        ("text", "no weight_map"),
    ],
)
def test_damaged_shard_index(weight_map: Any, match: str, gpt2_copy: Path) -> None:
    (gpt2_copy / "model.safetensors").rename(gpt2_copy / "model-1.safetensors")
    (gpt2_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with one_line(match):
        load_model(gpt2_copy)
