"""config.json of a GPT-2 folder: each field is obeyed as Transformers obeys it, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import runtime
from dmpt_export.onnx.export import export_onnx
from tests.helpers.checkpoints import edit_config, edit_tensors, one_line
from training import progress
from training.checkpoints import verify_gpt2
from training.checkpoints.checkpoint import load_model, read_config
from training.checkpoints.folder import unverified
from training.errors import InputError, ValidationError
from training.model.fields import ALIASES, CHOOSING, DMPT, FIXED, GPT2, HARMLESS, SAMPLING

IDS = [[5, 6, 7, 250, 3, 3, 9, 120, 44]]


def theirs(folder: Path) -> np.ndarray:
    """Transformers' own log-probs [S, V]."""
    model = GPT2LMHeadModel.from_pretrained(folder).float().eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(IDS)).logits[0].log_softmax(-1).numpy()
    return found


def ours(folder: Path) -> np.ndarray:
    with torch.no_grad(), unverified():
        found: np.ndarray = load_model(folder).log_probs(torch.tensor(IDS))[0].numpy()
    return found


def check(folder: Path) -> None:
    np.testing.assert_allclose(ours(folder), theirs(folder), rtol=0, atol=1e-4)


def test_the_table_knows_every_field_of_gpt2() -> None:
    """With any installed version of Transformers."""
    known = {*GPT2, *ALIASES, *FIXED, *HARMLESS, *CHOOSING, *SAMPLING}
    assert {name for name in GPT2Config().to_dict() if not name.startswith("_")} <= known
    assert GPT2Config.attribute_map.items() <= ALIASES.items()
    tables = [GPT2, DMPT, FIXED, HARMLESS, CHOOSING, SAMPLING, ALIASES]
    assert sum(map(len, tables)) == len(set().union(*tables))  # one list for each field


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
@pytest.mark.parametrize("both", [False, True])
def test_aliases_are_obeyed(alias: str, name: str, both: bool, make_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    """If a file has both, the alias wins, as in GPT2Config."""
    make_gpt2(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())
    value = fields.pop(name)
    path.write_text(json.dumps({**({name: 2 * value} if both else {}), **fields, alias: value}))
    assert getattr(read_config(tmp_path / "m"), name) == value
    check(tmp_path / "m")


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_number_of_attention_heads_may_come_by_its_alias(heads: int, gpt2_copy: Path) -> None:
    """No tensor name or shape shows it: only the results do."""
    path = gpt2_copy / "config.json"
    fields = json.loads(path.read_text())
    del fields["n_head"]
    path.write_text(json.dumps(fields | {"num_attention_heads": heads}))
    check(gpt2_copy)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_activations_are_the_library_s(activation: str, gpt2_copy: Path, tmp_path: Path) -> None:
    edit_tensors(gpt2_copy, lambda tensors: [tensors[name].mul_(2) for name in tensors if "mlp.c_fc.weight" in name])
    edit_config(gpt2_copy, activation_function=activation)
    check(gpt2_copy)
    export_onnx(gpt2_copy, tmp_path / "device")
    with runtime.load(tmp_path / "device") as model:
        np.testing.assert_allclose(model.log_probs(IDS[0]), theirs(gpt2_copy), rtol=0, atol=1e-4)


def test_the_two_forms_of_gelu_differ(gpt2_copy: Path) -> None:
    """Otherwise the test above could not fail."""
    edit_tensors(gpt2_copy, lambda tensors: [tensors[name].mul_(2) for name in tensors if "mlp.c_fc.weight" in name])
    edit_config(gpt2_copy, activation_function="gelu")
    exact = ours(gpt2_copy)
    edit_config(gpt2_copy, activation_function="gelu_new")
    assert np.abs(exact - ours(gpt2_copy)).max() > 1.5e-4


sizes = st.fixed_dictionaries(
    {
        "n_embd": st.sampled_from([8, 24, 48]),
        "n_head": st.sampled_from([1, 2, 4, 8]),
        "n_layer": st.integers(1, 3),
        "n_positions": st.sampled_from([9, 32]),
        "vocab_size": st.sampled_from([251, 300]),
    },
    optional={
        "n_inner": st.sampled_from([None, 16, 40]),
        "layer_norm_epsilon": st.sampled_from([1e-12, 1e-5, 0.1]),
        "activation_function": st.sampled_from(["gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "quick_gelu"]),
        "scale_attn_weights": st.booleans(),
        "scale_attn_by_inverse_layer_idx": st.booleans(),
        "reorder_and_upcast_attn": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "resid_pdrop": st.sampled_from([0, 0.1]),
        "bos_token_id": st.sampled_from([None, 3, 50256]),
        "eos_token_id": st.sampled_from([None, 3, 50256, [3, 4]]),
        "use_cache": st.booleans(),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=sizes, renamed=st.sets(st.sampled_from(sorted(ALIASES))), seed=st.integers(0, 3))
def test_any_config_computes_what_transformers_computes_or_is_refused_by_name(
    fields: dict[str, Any], renamed: set[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**fields, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    for alias in renamed:
        written[alias] = written.pop(ALIASES[alias])
    path.write_text(json.dumps(written))
    try:
        found = ours(folder)
    except InputError as error:
        refused = ("activation_function", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
        assert any(name in str(error) for name in refused)  # noqa: PT017
        return
    with torch.no_grad():
        want = model(torch.tensor(IDS)).logits[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, [None, True, "0.1", 1.5, -0.1, float("nan"), [], {}]) for name in ("resid_pdrop", "embd_pdrop",
                                                                                    "attn_pdrop")),
        ("initializer_range", [None, "x", -1, float("inf"), []]),
        ("layer_norm_epsilon", [None, 0, "1e-5", float("nan"), True]),
        *((name, [None, 0, -1, 1.5, "4", True, [4]]) for name in ("n_head", "n_layer", "vocab_size", "n_positions")),
        ("n_inner", [0, "x", True]),
        ("tie_word_embeddings", [None, 1, "yes"]),
        ("activation_function", [None, 3, "relu", ["gelu"]]),
        ("eos_token_id", [-1, "x", [1, "x"], True, 1.5]),
        ("bos_token_id", [-1, "x", [1], True]),
        ("quantization_config", [{"bits": 4}]),
        ("auto_map", [{"AutoModel": "m.M"}]),
        ("architectures", [["GPT2ForSequenceClassification"], ["OtherModel"]]),
        ("pruned_heads", [{"0": [1]}]),
        ("add_cross_attention", [True]),
        ("scale_attn_weights", [False]),
        ("scale_attn_by_inverse_layer_idx", [True]),
        ("rotary_dim", [32]),  # fields that GPT-2 does not have
        ("use_alibi", [True]),
        ("suppress_tokens", [[1, 2]]),
        ("bad_words_ids", [[[1]]]),
        ("forced_eos_token_id", [3]),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_named(name: str, values: list[Any], gpt2_copy: Path) -> None:
    for value in values:
        edit_config(gpt2_copy, **{name: value})
        with one_line(name, "config.json"):
            load_model(gpt2_copy)


def test_remarks_are_named_once(gpt2_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress.NOTED.clear()
    edit_config(gpt2_copy, my_note="trained at home", flag=False, _internal=7, do_sample=True)
    for _ in range(3):
        load_model(gpt2_copy)
    assert capsys.readouterr().err == f"note: {gpt2_copy}/config.json: not used: do_sample, my_note, flag\n"


def test_no_field_reaches_the_library_unless_it_is_known(gpt2_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some fields of a config.json make Transformers fetch and run code."""
    given: list[dict[str, Any]] = []
    real = GPT2Config.from_dict
    monkeypatch.setattr(GPT2Config, "from_dict", lambda fields, **more: given.append(fields) or real(fields, **more))
    edit_config(gpt2_copy, _attn_implementation_internal="someone/kernel", _name_or_path="someone/else")
    load_model(gpt2_copy)
    assert given
    assert not any("someone" in str(fields) for fields in given)


# --- tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("stem", ["transformer.", ""])
def test_wrappers_prefixes_are_read(wrapper: str, stem: str, gpt2_copy: Path) -> None:
    want = ours(gpt2_copy)
    rename(gpt2_copy, lambda name: wrapper + stem + name.removeprefix("transformer."))
    assert np.array_equal(ours(gpt2_copy), want)
    load_model(gpt2_copy)  # and Transformers agrees


def rename(folder: Path, how: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({how(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_a_prefix_of_some_names_only_is_refused(gpt2_copy: Path) -> None:
    rename(gpt2_copy, lambda name: f"module.{name}" if ".h.0." in name else name)
    with one_line("module.transformer.h.0"):
        load_model(gpt2_copy)


@pytest.mark.parametrize(("wrapper", "stem"), [("", "transformer."), ("module.", "transformer."), ("", "")])
def test_messages_use_the_file_s_names(wrapper: str, stem: str, gpt2_copy: Path) -> None:
    rename(gpt2_copy, lambda name: wrapper + stem + name.removeprefix("transformer."))
    edit_config(gpt2_copy, tie_word_embeddings=False)
    with one_line(f"missing: {wrapper}lm_head.weight"):
        load_model(gpt2_copy)
    edit_config(gpt2_copy, tie_word_embeddings=True)
    edit_tensors(gpt2_copy, lambda tensors: tensors.pop(f"{wrapper}{stem}h.1.ln_1.weight"))
    with one_line(f"missing: {wrapper}{stem}h.1.ln_1.weight"):
        load_model(gpt2_copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_head_that_differs_is_kept(
    dtype: torch.dtype, gpt2_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json ties it, as save_pretrained writes by default; the file's own weights win."""
    progress.NOTED.clear()

    def own(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        head = tensors["transformer.wte.weight"].clone()
        head[-1, -1] += 0.5  # one number
        tensors["lm_head.weight"] = head

    edit_tensors(gpt2_copy, own)
    model = load_model(gpt2_copy)
    assert not model.config.tie_word_embeddings
    assert model.heads[0].weight[-1, -1] != model.transformer.wte.weight[-1, -1]
    err = capsys.readouterr().err
    assert err.count("lm_head.weight differs from the embedding") == 1
    manifest = export_onnx(gpt2_copy, tmp_path / "device")
    assert "heads.0" in manifest["parts"]


def test_a_head_that_is_the_embedding_is_tied(gpt2_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_tensors(gpt2_copy, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert load_model(gpt2_copy).config.tie_word_embeddings
    assert "differs" not in capsys.readouterr().err


# --- the comparison with Transformers ------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"n_head": 2},
        {"n_head": 8},
        {"layer_norm_epsilon": 1e-2},
        {"activation_function": "gelu"},
    ],
    ids=str,
)
def test_reading_that_computes_something_else_is_stopped(
    change: dict[str, Any], gpt2_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imitate the effect of a field that is not read."""
    edit_tensors(gpt2_copy, lambda tensors: [tensors[name].mul_(2) for name in tensors if "mlp.c_fc.weight" in name])
    import training.checkpoints.checkpoint as checkpoint

    real = checkpoint.read_config

    def misread(source: Any) -> Any:
        config = real(source)
        for name, value in change.items():
            setattr(config, name, value)
        return config

    monkeypatch.setattr(checkpoint, "read_config", misread)
    with pytest.raises(ValidationError, match=r"the log-prob of token \d+ after position \d+ .*block 0") as caught:
        load_model(gpt2_copy)
    assert caught.value.exit_code == 4
    with unverified():
        load_model(gpt2_copy)


def test_a_swapped_tensor_is_noticed(gpt2_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training.checkpoints.checkpoint as checkpoint

    real = checkpoint.model_from_tensors

    def swapped(config: Any, tensors: Any) -> Any:
        a, b = (f"transformer.h.{i}.attn.c_attn.weight" for i in (2, 3))
        return real(config, {**tensors, a: tensors[b], b: tensors[a]})

    monkeypatch.setattr(checkpoint, "model_from_tensors", swapped)
    with pytest.raises(ValidationError, match="block 2 is the first that differs"):
        load_model(gpt2_copy)


def test_a_folder_is_compared_once_until_it_changes(gpt2_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    real = verify_gpt2.compare_log_probs
    monkeypatch.setattr(
        verify_gpt2, "compare_log_probs", lambda folder, *rest: calls.append(folder) or real(folder, *rest)
    )
    load_model(gpt2_copy)
    load_model(gpt2_copy)
    verify_gpt2.PASSED.clear()  # another process
    load_model(gpt2_copy)
    assert len(calls) == 1
    edit_config(gpt2_copy, layer_norm_epsilon=1e-6)
    load_model(gpt2_copy)
    assert len(calls) == 2
    edit_tensors(gpt2_copy, lambda tensors: tensors["transformer.ln_f.bias"].add_(1))
    load_model(gpt2_copy)
    assert len(calls) == 3
    load_model(Path(shutil.copytree(gpt2_copy, gpt2_copy.parent / "elsewhere")))
    assert len(calls) == 4
