"""Checkpoint folders: reading GPT-2 and DMPT, writing them, and their other files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checkpoints import edit_tensors, one_line
from tests.helpers.models import random_model
from tests.helpers.tolerances import TOLERANCE
from training.checkpoints.checkpoint import copy_tokenizer, expected_shapes, load_model, load_state, save_model
from training.model.shape import Shape

LIMIT = TOLERANCE["float32", "torch"]
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))


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
    assert not model.training
    assert model.config.splits == []
    assert model.config.head_allocation == {"root": [0]}
    assert model.heads[0].weight is model.transformer.wte.weight
    torch.testing.assert_close(ours(tiny_gpt2), reference(tiny_gpt2), atol=LIMIT, rtol=0)


def test_gpt2_with_its_own_settings_equals_hugging_face(make_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    make_gpt2(tmp_path, n_inner=48, tie_word_embeddings=False, layer_norm_epsilon=1e-2, n_layer=2)
    model = load_model(tmp_path)
    assert model.config.n_inner == 48
    assert not model.config.tie_word_embeddings
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
    assert len(list(gpt2_copy.glob("model-*.safetensors"))) > 1
    assert not (gpt2_copy / "model.safetensors").exists()
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
    assert list(before)
    assert set(before) == set(after) == set(expected_shapes(config))
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name
    for field in FIELDS:
        assert getattr(again, field) == getattr(config, field), field
    assert torch.equal(ours(source), ours(tmp_path / "copy"))


def test_checkpoint_folder_is_complete(tiny_dmpt: Path) -> None:
    names = {path.name for path in tiny_dmpt.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    fields = json.loads((tiny_dmpt / "config.json").read_text())
    assert fields["model_type"] == "dmpt"
    assert fields["splits"] == [2]
    assert fields["fast_k"] == 16
    assert {"gate_hidden", "gate_temp", "head_gate_temp", "head_topk", "head_allocation"} <= set(fields)
    assert "heads.0.weight" not in load_file(tiny_dmpt / "model.safetensors")  # tied: stored once
    assert "splits [2]" in (tiny_dmpt / "README.md").read_text()


def test_transformers_reads_and_writes_the_same_folder(tiny_dmpt: Path, tmp_path: Path) -> None:
    from training.model.generation import DMPTForCausalLM

    model = DMPTForCausalLM.from_pretrained(tiny_dmpt).eval()
    assert torch.equal(model.log_probs(IDS), ours(tiny_dmpt))
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(ours(tmp_path / "theirs"), ours(tiny_dmpt))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_and_writes_projected_heads(tied: bool, tmp_path: Path) -> None:
    from training.model.generation import DMPTForCausalLM

    fields: dict[str, Any] = {"head_kind": "projected", "head_rank": 5, "shared_anchor": True}
    model = random_model([2], 8, fast_k=16, tie_word_embeddings=tied, **fields)
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "mine")
    for folder in ("theirs", "mine"):
        for read in (DMPTForCausalLM.from_pretrained, load_model):
            again = read(tmp_path / folder)
            assert again.config.projected_heads == [1, 2, 3, 4, 5, 6, 7]
            assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


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
    assert copy_tokenizer(src, dst, Shape.of({"vocab_size": 300}))
    assert {path.name for path in dst.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert not copy_tokenizer(empty, dst)
    with one_line("has ids up to 299", str(src)):
        copy_tokenizer(src, empty, Shape.of({"vocab_size": 299}))
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
from dmpt_export.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", [["init"], ["quantize", "--scheme", "int8"]], ids=lambda verb: verb[0])
def test_full_disk_is_exit_code_5_and_leaves_nothing(verb: list[str], tiny_gpt2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, *verb, str(tiny_gpt2), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
