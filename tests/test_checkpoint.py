"""Checkpoint folders: reading GPT-2 and DMPT, damage, writing; atomic replacement."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tolerances import TOLERANCE
from training.checkpoint import (
    copy_tokenizer,
    expected_shapes,
    load_model,
    load_state,
    read_config,
    resolve,
    save_model,
)
from training.errors import InputError

LIMIT = TOLERANCE["float32", "torch"]
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def gpt2_copy(tiny_gpt2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_gpt2, tmp_path / "gpt2"))


@pytest.fixture
def dmpt_copy(tiny_dmpt: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dmpt, tmp_path / "dmpt"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def one_line(match: str, *names: str) -> Iterator[None]:
    """InputError for people: exit code 3, one line, naming the things it is about."""
    with pytest.raises(InputError, match=match) as caught:
        yield
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in message
    for name in names:
        assert name in message


@torch.no_grad()
def reference(folder: Path) -> torch.Tensor:
    """Log-probs of Hugging Face's own GPT-2: the oracle."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    return torch.log_softmax(model(IDS).logits, -1)


@torch.no_grad()
def ours(folder: Path) -> torch.Tensor:
    return load_model(folder).log_probs(IDS)


# --- GPT-2 ------------------------------------------------------------------------------------------


def test_gpt2_equals_hugging_face(tiny_gpt2: Path) -> None:
    model = load_model(tiny_gpt2)
    assert not model.training and model.config.splits == [] and model.config.head_allocation == {"root": [0]}
    assert model.heads[0].weight is model.transformer.wte.weight
    torch.testing.assert_close(ours(tiny_gpt2), reference(tiny_gpt2), atol=LIMIT, rtol=0)


def test_gpt2_with_its_own_settings_equals_hugging_face(make_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    make_gpt2(tmp_path, n_inner=48, tie_word_embeddings=False, layer_norm_epsilon=1e-2, n_layer=2)
    model = load_model(tmp_path)
    assert model.config.n_inner == 48 and not model.config.tie_word_embeddings
    torch.testing.assert_close(ours(tmp_path), reference(tmp_path), atol=LIMIT, rtol=0)
    assert "heads.0.weight" in load_state(tmp_path)[1]


def test_hub_form_of_gpt2_reads_the_same(gpt2_copy: Path, tiny_gpt2: Path) -> None:
    def hub_form(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(4):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().to(torch.uint8)
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_tensors(gpt2_copy, hub_form)
    assert torch.equal(ours(gpt2_copy), ours(tiny_gpt2))


def test_shards_read_the_same(tiny_gpt2: Path, gpt2_copy: Path) -> None:
    from transformers import GPT2LMHeadModel

    (gpt2_copy / "model.safetensors").unlink()
    GPT2LMHeadModel.from_pretrained(tiny_gpt2).save_pretrained(gpt2_copy, max_shard_size="60KB")
    assert len(list(gpt2_copy.glob("model-*.safetensors"))) > 1 and not (gpt2_copy / "model.safetensors").exists()
    assert torch.equal(ours(gpt2_copy), ours(tiny_gpt2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(dtype: torch.dtype, gpt2_copy: Path) -> None:
    before = load_file(gpt2_copy / "model.safetensors")
    edit_tensors(gpt2_copy, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    _, state = load_state(gpt2_copy)
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}
    for name, tensor in before.items():
        np.testing.assert_array_equal(state[name], tensor.to(dtype).float().numpy())


FIELDS = ("n_layer", "n_inner", "splits", "head_allocation", "fast_k", "head_topk", "gate_hidden", "gate_temp",
          "eos_token_id", "tie_word_embeddings")  # fmt: skip


# --- round trip -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["tiny_gpt2", "tiny_dmpt", "tiny_quad"])
def test_saving_and_loading_changes_no_bit(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(fixture)
    config, before = load_state(source)
    save_model(load_model(source), tmp_path / "copy", tokenizer_from=source)
    again, after = load_state(tmp_path / "copy")
    assert list(before) and set(before) == set(after) == set(expected_shapes(config))
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name
    for field in FIELDS:
        assert getattr(again, field) == getattr(config, field), field
    assert torch.equal(ours(source), ours(tmp_path / "copy"))


def test_checkpoint_folder_is_complete(tiny_dmpt: Path) -> None:
    names = {path.name for path in tiny_dmpt.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    fields = json.loads((tiny_dmpt / "config.json").read_text())
    assert fields["model_type"] == "dmpt" and fields["splits"] == [2] and fields["fast_k"] == 16
    assert {"gate_hidden", "gate_temp", "head_gate_temp", "head_topk", "head_allocation"} <= set(fields)
    assert "heads.0.weight" not in load_file(tiny_dmpt / "model.safetensors")  # tied: stored once
    assert "splits [2]" in (tiny_dmpt / "README.md").read_text()


def test_transformers_reads_and_writes_the_same_folder(tiny_dmpt: Path, tmp_path: Path) -> None:
    from training.model import DMPTForCausalLM

    model = DMPTForCausalLM.from_pretrained(tiny_dmpt).eval()
    assert torch.equal(model.log_probs(IDS), ours(tiny_dmpt))
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(ours(tmp_path / "theirs"), ours(tiny_dmpt))


def test_untied_model_in_a_tied_config_is_not_written(tiny_dmpt: Path, tmp_path: Path) -> None:
    model = load_model(tiny_dmpt)
    model.heads[0].weight = torch.nn.Parameter(model.heads[0].weight.detach().clone())
    with pytest.raises(ValueError, match="tie_weights"):
        save_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_json_is_always_there(tokenizer_folder: Path, tmp_path: Path) -> None:
    src, dst, empty = tmp_path / "src", tmp_path / "dst", tmp_path / "empty"
    for folder in (src, dst, empty):
        folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder / name, src)
    assert copy_tokenizer(src, dst, vocab_size=300)
    assert {path.name for path in dst.iterdir()} == {"tokenizer.json", "vocab.json", "merges.txt"}
    assert not copy_tokenizer(empty, dst)
    with one_line("knows ids up to 299", str(src)):
        copy_tokenizer(src, empty, vocab_size=299)
    assert list(empty.iterdir()) == []


def test_copied_tokenizer_does_not_cut_texts(tokenizer_folder: Path, tmp_path: Path, sample_text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    whole = tokenizer.encode(sample_text).ids
    tokenizer.enable_truncation(8)
    (tmp_path / "src").mkdir()
    tokenizer.save(str(tmp_path / "src" / "tokenizer.json"))
    assert copy_tokenizer(tmp_path / "src", tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(sample_text).ids == whole


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow longer: the same as a full disk
from dmpt_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", [["init"], ["quantize", "--scheme", "int8"]], ids=lambda verb: verb[0])
def test_full_disk_is_exit_code_5_and_leaves_nothing(verb: list[str], tiny_gpt2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, *verb, str(tiny_gpt2), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


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
    assert resolve("gpt2") == tiny_gpt2 and asked[0][0] == "gpt2"
    assert "model*.safetensors" in asked[0][1] and not any(".bin" in pattern for pattern in asked[0][1])
    Path("gpt2").mkdir()
    assert resolve("gpt2") == Path("gpt2") and len(asked) == 1


def test_refused_hub_id_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, allow_patterns: list[str]) -> str:
        raise OSError("401 Client Error\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with one_line("does not give out.*401 Client Error"):
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
        ({"activation_function": "relu"}, "only gelu_new"),
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
        ({"eos_token_id": [0]}, "eos_token_id must be a token id"),
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
def test_end_of_text_that_a_small_gpt2_inherited_is_none(given: dict[str, int], gpt2_copy: Path) -> None:
    path = gpt2_copy / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if not k.endswith("_token_id")} | given))
    config = read_config(gpt2_copy)
    assert config.eos_token_id is None and config.bos_token_id is None


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
    "header that is no JSON": (b"{nope", b"", None),
    "header that is no UTF-8": (b"\xff\xfe\xfd\xfc", b"", None),
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
