"""Of a foreign folder's config.json and tokenizer settings, libraries get fields of a list only. Others can make them
fetch and run code, or read other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel, PretrainedConfig

from benchmarks.peers.registry import gpt2_folder
from quant.checkpoint import dequantized_model, save_quantized
from tests.helpers.checkpoints import edit_config, one_line
from training import progress
from training.checkpoints import record
from training.checkpoints.checkpoint import load_model
from training.errors import InputError
from training.model.fields import OWN
from training.text.tokenizer import load_tokenizer
from training.text.windows import train_tokenizer

EVIL = "someone/kernel"
QUIET: dict[str, Any] = {  # without effect; the libraries never see them
    "_attn_implementation_internal": EVIL,  # CVE-2026-4372
    "_attn_implementation": EVIL,
    "attn_implementation": EVIL,
    "_attn_implementation_autoset": EVIL,
    "_experts_implementation": EVIL,
    "_experts_implementation_internal": EVIL,
    "experts_implementation": EVIL,
    "_name_or_path": EVIL,
    "_commit_hash": EVIL,
    "dtype": EVIL,
    "torch_dtype": EVIL,
    "kernel_config": EVIL,
    "transformers_weights": EVIL,
    "base_model_name_or_path": EVIL,
}
REFUSED: dict[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": f"{EVIL}--modeling.Model", "AutoConfig": "code.Config"},
    "quantization_config": {"quant_method": EVIL},
}
# Refused in a GPT-2, which has fields of GPT-2 alone, and noted in a DMPT.
UNKNOWN: dict[str, Any] = {"trust_remote_code": True, "kernels": {"attention": EVIL}, "attribute_map": {"n_embd": EVIL}}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The fields of every configuration that Transformers' classes are given."""
    found: list[dict[str, Any]] = []
    real = PretrainedConfig.from_dict.__func__

    def from_dict(cls: Any, fields: dict[str, Any], **more: Any) -> Any:
        found.append({**fields, **more})
        return real(cls, fields, **more)

    monkeypatch.setattr(PretrainedConfig, "from_dict", classmethod(from_dict))
    return found


def folder_of(kind: str, request: pytest.FixtureRequest) -> Path:
    copy: Path = request.getfixturevalue(f"{kind}_copy")
    return copy


@pytest.mark.parametrize("kind", ["gpt2", "dmpt"])
@pytest.mark.parametrize("name", [*QUIET, *UNKNOWN])
def test_no_library_gets_a_field_that_is_not_listed(
    name: str, kind: str, given: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    folder, value = folder_of(kind, request), {**QUIET, **UNKNOWN}[name]
    edit_config(folder, **{name: value})
    if kind == "gpt2" and name in UNKNOWN:
        with one_line(name):
            load_model(folder)
        return
    model = load_model(folder)
    assert given
    assert not [fields for fields in given if name in fields or EVIL in str(fields)]
    assert EVIL not in str(vars(model.config))
    assert not hasattr(model.config, name) or getattr(model.config, name) != value


@pytest.mark.parametrize("kind", ["gpt2", "dmpt"])
@pytest.mark.parametrize("name", REFUSED)
def test_code_and_other_tools_quantization_are_refused(
    name: str, kind: str, given: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    folder = folder_of(kind, request)
    edit_config(folder, **{name: REFUSED[name]})
    with one_line(name):
        load_model(folder)
    assert given == []


def test_a_quantized_folder_is_read_like_that(dmpt_copy: Path, tmp_path: Path, given: list[dict[str, Any]]) -> None:
    save_quantized(dmpt_copy, tmp_path / "q", "int8")
    given.clear()
    edit_config(tmp_path / "q", _attn_implementation=EVIL, attn_implementation=EVIL)
    dequantized_model(tmp_path / "q")
    assert given
    assert EVIL not in str(given)


def test_fields_of_a_dmpt_that_are_not_used_are_named_once(dmpt_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress.NOTED.clear()
    edit_config(dmpt_copy, depth=3, my_note="at home", nothing=None, _internal=7, use_cache=True, pad_token_id=5)
    for _ in range(2):
        assert load_model(dmpt_copy).config.pad_token_id == 5
    assert capsys.readouterr().err == f"note: {dmpt_copy}/config.json: not used: depth, my_note\n"


def test_the_training_record_is_one_of_a_dmpt_s_fields() -> None:
    assert record.FIELD in OWN


# --- tokenizers ---------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A tokenizer outside the folder, which must not be read."""
    folder = tmp_path / "outside"
    folder.mkdir()
    tokenizer = train_tokenizer(["secret words of another folder"] * 3, 270)
    for name in ("tokenizer.json", "tokenizer.4.0.json"):
        tokenizer.save(str(folder / name))
    tokenizer.model.save(str(folder))
    return folder


def test_settings_name_no_other_file(gpt2_copy: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = load_tokenizer(gpt2_copy).to_str()
    seen: list[str] = []
    real = AutoTokenizer.from_pretrained

    def from_pretrained(place: str, **options: Any) -> Any:
        assert options == {"local_files_only": True, "trust_remote_code": False}
        seen.extend(path.read_text(encoding="utf-8") for path in Path(place).glob("*.json"))
        return real(place, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    planted = {
        "tokenizer_file": f"{other}/tokenizer.json",
        "fast_tokenizer_files": [f"{other}/tokenizer.4.0.json", f"{other}/tokenizer.json"],
        "vocab_file": f"{other}/vocab.json",
        "merges_file": f"{other}/merges.txt",
        "gguf_file": f"{other}/x.gguf",
        "name_or_path": str(other),
        "tokenizer_object": str(other),
        "post_processor": str(other),
        "trust_remote_code": True,
        "local_files_only": False,
    }
    for name, value in planted.items():
        settings = json.dumps({"eos_token": "<|endoftext|>", name: value})
        (gpt2_copy / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        assert load_tokenizer(gpt2_copy).to_str() == want, name
        (gpt2_copy / "tokenizer_config.json").unlink()
        (gpt2_copy / "special_tokens_map.json").write_text(settings, encoding="utf-8")
        with pytest.raises(InputError, match="does not hold tokens"):
            load_tokenizer(gpt2_copy)
        (gpt2_copy / "special_tokens_map.json").unlink()
    assert len(seen) >= len(planted)
    assert not any(str(other) in text or "trust_remote_code" in text for text in seen)


def test_settings_that_are_not_used_are_named(gpt2_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress.NOTED.clear()
    settings = {
        "eos_token": "<|endoftext|>",
        "my_token": "<|endoftext|>",
        "depth": 3,
        "chat_template": "x",
        "is_local": True,
    }
    (gpt2_copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    load_tokenizer(gpt2_copy)
    assert capsys.readouterr().err == f"note: {gpt2_copy}/tokenizer_config.json: not used: depth\n"


# --- peers --------------------------------------------------------------------------------------------


def test_peers_get_a_plain_config(gpt2_copy: Path, dmpt_copy: Path, tmp_path: Path, make_dmpt: Any) -> None:
    """From_pretrained() of other libraries reads it."""
    make_dmpt(tmp_path / "one", splits=[], head_allocation={"root": [0]})
    planted = dict.fromkeys(QUIET.keys() - {"dtype", "torch_dtype"}, EVIL)
    assert gpt2_folder(gpt2_copy, tmp_path / "x") == gpt2_copy
    for source in (gpt2_copy, tmp_path / "one"):
        edit_config(source, **planted)
        made = gpt2_folder(source, tmp_path / f"plain-{source.name}")
        assert made != source
        assert EVIL not in (made / "config.json").read_text(encoding="utf-8")
        theirs = GPT2LMHeadModel.from_pretrained(made).state_dict()
        assert theirs["transformer.wte.weight"].equal(load_model(source).state_dict()["transformer.wte.weight"])


def test_peers_do_not_follow_an_adapter_to_its_model(gpt2_copy: Path, tmp_path: Path) -> None:
    """Where peft is installed, Transformers would load the model that this file names instead."""
    (gpt2_copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": EVIL}), encoding="utf-8")
    made = gpt2_folder(gpt2_copy, tmp_path / "plain")
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "model.safetensors"]
