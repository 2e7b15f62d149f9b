"""A foreign folder's tokenizer gives the same ids as AutoTokenizer in training, evaluation and on the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

import runtime
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import save_quantized
from tests.helpers.checkpoints import edit_config, one_line
from training import progress
from training.checkpoints.checkpoint import load_model, read_config
from training.errors import InputError, ValidationError
from training.text import verify_tokenizer
from training.text.tokenizer import encode, load_tokenizer
from training.text.windows import encode_lines, end_of_text_id

USER = "<|user|>"
TEXTS = [
    "The tide mill", " wait <|user|> for it", "<|user|><|user|> x", "a<|user|>b  <|user|>  c", "Naïve 日本 😀",
    "\t\n <", "it's 12:30", "<|endoftext|> The",
]  # fmt: skip


def token(**flags: bool) -> dict[str, Any]:
    return {"content": USER, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False} | flags  # fmt: skip


def pair(folder: Path) -> None:
    """Only vocab.json and merges.txt."""
    (folder / "tokenizer.json").unlink()


def ready(folder: Path) -> None:
    """Only tokenizer.json."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def put(name: str, value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        old = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**old, **value}))

    return write


def settings_of(**fields: Any) -> Callable[[Path], None]:
    return put("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **fields})


def in_tokenizer_json(**flags: bool) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        known = {name: value for name, value in flags.items() if name != "special"}
        new = AddedToken(USER, special=flags.get("special", True), **known)
        (tokenizer.add_special_tokens if new.special else tokenizer.add_tokens)([new])
        tokenizer.save(str(folder / "tokenizer.json"))

    return write


def template(folder: Path) -> None:
    """A beginning and an end of text in tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


FILES: dict[str, list[Callable[[Path], None]]] = {
    "as saved": [],
    "tokenizer.json": [ready],
    "vocab and merges": [pair],
    "added_tokens.json": [pair, put("added_tokens.json", {USER: 299})],
    "added_tokens.json and special_tokens_map.json": [
        pair, put("added_tokens.json", {USER: 299}),
        put("special_tokens_map.json", {"additional_special_tokens": [USER], "eos_token": "<|endoftext|>"}),
    ],
    **{
        f"added_tokens_decoder, {flag}": [pair, settings_of(added_tokens_decoder={"299": token(**{flag: value})})]
        for flag, value in (("special", False), ("lstrip", True), ("rstrip", True), ("single_word", True),
                            ("normalized", True))
    },
    "added_tokens_decoder beside tokenizer.json": [ready, settings_of(added_tokens_decoder={"299": token()})],
    **{f"tokenizer.json, {flag}": [ready, in_tokenizer_json(**{flag: True})] for flag in ("lstrip", "rstrip",
                                                                                        "single_word")},
    "tokenizer.json, not special": [ready, in_tokenizer_json(special=False)],
    "add_prefix_space, tokenizer.json": [ready, settings_of(add_prefix_space=True)],
    "add_prefix_space, pair": [pair, settings_of(add_prefix_space=True)],
    "add_bos_token, pair": [pair, settings_of(add_bos_token=True)],
    "add_bos_token, tokenizer.json": [ready, settings_of(add_bos_token=True)],
    "special tokens by name": [pair, settings_of(pad_token=USER, eos_token="<|endoftext|>")],
    "a template": [ready, template],
    "truncation and padding": [settings_of(model_max_length=4, padding_side="left", truncation_side="left")],
    "a class of its own": [ready, settings_of(tokenizer_class="PreTrainedTokenizerFast")],
}  # fmt: skip


@pytest.fixture(scope="module")
def small(make_gpt2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose tokenizer leaves some of the 300 embedding rows unused."""
    folder = tmp_path_factory.mktemp("small") / "gpt2"
    make_gpt2(folder, n_layer=1)
    full = Tokenizer.from_file(str(folder / "tokenizer.json"))
    data = json.loads(full.to_str())
    vocabulary = {name: i for name, i in data["model"]["vocab"].items() if i < 299}
    merges = [m for m in data["model"]["merges"] if "".join(m if isinstance(m, list) else m.split(" ")) in vocabulary]
    data["model"] |= {"vocab": vocabulary, "merges": merges}
    tokenizer = Tokenizer.from_str(json.dumps(data))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return folder


def made(small: Path, out: Path, changes: list[Callable[[Path], None]]) -> Path:
    folder = Path(shutil.copytree(small, out))
    for change in changes:
        change(folder)
    return folder


def front(want: list[int], own: list[int]) -> list[int]:
    """Transformers' ids without those that a template appends to a text."""
    return want[: len(own)] if want[: len(own)] == own and set(want[len(own) :]) <= {0} else want


@pytest.mark.parametrize("name", FILES)
def test_ids_are_autotokenizer_s_everywhere(name: str, small: Path, tmp_path: Path) -> None:
    folder = made(small, tmp_path / "m", FILES[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    model = load_model(folder)  # compares them, too
    export_onnx(folder, tmp_path / "device", verify=False)
    save_quantized(folder, tmp_path / "quantized", "int8")
    with runtime.load(tmp_path / "device") as device:
        for text in TEXTS:
            own = encode(ours, text)
            assert own == front(theirs(text)["input_ids"], own), text
            assert device.encode(text) == own, text
            assert encode(load_tokenizer(tmp_path / "device"), text) == own, text
            assert encode(load_tokenizer(tmp_path / "quantized"), text) == own, text
            assert (
                AutoTokenizer.from_pretrained(tmp_path / "quantized")(text, add_special_tokens=False)["input_ids"]
                == ours.encode(text, add_special_tokens=False).ids
            ), text
    end = end_of_text_id(ours, model.config)
    line = "The tide mill"
    assert encode_lines(line, ours, end).tolist() == [*encode(ours, line), end]


def test_the_cases_above_differ(small: Path, tmp_path: Path) -> None:
    """Otherwise they would not show which files are read."""
    found = set()
    for i, name in enumerate(("as saved", "added_tokens.json", "add_prefix_space, pair", "add_bos_token, pair",
                              "added_tokens_decoder, lstrip", "added_tokens_decoder, rstrip")):  # fmt: skip
        tokenizer = load_tokenizer(made(small, tmp_path / str(i), FILES[name]))
        found.add(tuple(tuple(encode(tokenizer, text)) for text in TEXTS))
    assert len(found) == 6


@pytest.fixture(scope="module")
def user_device(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    place = tmp_path_factory.mktemp("user")
    folder = made(small, place / "m", FILES["added_tokens_decoder, lstrip"])
    export_onnx(folder, place / "device", verify=False)
    return AutoTokenizer.from_pretrained(folder), place / "device"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(st.text(max_size=12), st.sampled_from([USER, "<|endoftext|>", " ", "  \n"]))))
def test_any_text_has_autotokenizer_s_ids(parts: list[str], user_device: tuple[Any, Path]) -> None:
    theirs, folder = user_device
    text = "".join(parts)
    assert encode(load_tokenizer(folder), text) == theirs(text)["input_ids"]


# --- ends of a text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, 0, [0]),
        (5, 0, [5]),
        ([5, 0], 0, [5, 0]),
        ([5, 50256], 0, [5]),
        (None, 50256, [0]),  # GPT2Config's default in a small vocabulary: the tokenizer knows better
        (50256, 50256, [0]),
        (None, [7, 8], [7, 8]),
        (None, None, [0]),
        ([], 3, [3]),
    ],
)
def test_one_rule_for_the_ends_of_a_text(
    generation: Any, config: Any, ends: list[int], small: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "m"))
    edit_config(folder, eos_token_id=config)
    (folder / "generation_config.json").write_text(
        json.dumps({} if generation is None else {"eos_token_id": generation})
    )
    assert read_config(folder).eos_token_id == (ends if len(ends) > 1 else ends[0])
    save_quantized(folder, tmp_path / "quantized", "int8")
    for source in (folder, tmp_path / "quantized"):
        manifest = export_onnx(source, tmp_path / f"device-{source.name}", verify=False)
        assert manifest["text"]["end_of_text"] == ends
        with runtime.load(tmp_path / f"device-{source.name}") as device:
            assert device.end_of_text == ends[0]
            assert device.ends == set(ends)
    text = tmp_path / "text"
    text.write_text("The tide mill\n" * 3)
    out = tmp_path / "tuned"
    options = ["--max-steps", "1", "--max-length", "8", "--batch-size", "1", "--cache-dir", str(tmp_path / "cache")]
    assert main(["train", str(folder), str(out), "--data", str(text), *options]) == 0
    assert read_config(out).eos_token_id == (ends if len(ends) > 1 else ends[0])
    [cached] = (tmp_path / "cache").glob("tokens-*.bin")
    assert np.fromfile(cached, "<i4")[-1] == ends[0]  # what training puts between texts


def test_generation_stops_at_any_of_the_ends(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "m"))
    export_onnx(folder, tmp_path / "plain", verify=False)
    with runtime.load(tmp_path / "plain") as model:
        written = model.generate([5, 6, 7], max_new_tokens=20, seed=1)
    second = next(token for token in written[1:] if token not in written[:1])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [298, second]}))
    export_onnx(folder, tmp_path / "device", verify=False)
    with runtime.load(tmp_path / "device") as model:
        stream = model.stream([5, 6, 7], max_new_tokens=20, seed=1)
        assert [token.id for token in stream] == written[: written.index(second) + 1]
        assert stream.stop_reason == "end_of_text"


@pytest.mark.parametrize("value", ["x", -1, [1, "x"], True, {"a": 1}])
def test_ends_of_the_wrong_kind_are_named(value: Any, gpt2_copy: Path) -> None:
    (gpt2_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with one_line("generation_config.json: eos_token_id"):
        read_config(gpt2_copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [("suppress_tokens", [1]), ("bad_words_ids", [[3]]), ("forced_eos_token_id", 3), ("stop_strings", ["x"]),
     ("no_repeat_ngram_size", 2), ("sequence_bias", [[[1], 2.0]])],
)  # fmt: skip
def test_settings_that_choose_tokens_are_refused_by_name(name: str, value: Any, gpt2_copy: Path) -> None:
    (gpt2_copy / "generation_config.json").write_text(json.dumps({name: value}))
    with one_line(rf"generation_config.json: {name} is"):
        read_config(gpt2_copy)


def test_sampling_defaults_are_named_once(gpt2_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress.NOTED.clear()
    (gpt2_copy / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 50}))
    read_config(gpt2_copy)
    read_config(gpt2_copy)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith("options: do_sample, temperature\n")


# --- which ids are valid ------------------------------------------------------------------------------


def test_a_token_without_a_row_works_in_every_verb(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DialoGPT's layout: one added token more than the embedding has rows."""
    progress.NOTED.clear()
    folder = Path(shutil.copytree(small, tmp_path / "m"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<a>", "[PAD]"])  # 299, which has a row, and 300
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text"
    text.write_text("The [PAD] tide <a> mill\n" * 20)
    cache, data = ["--cache-dir", str(tmp_path / "cache")], ["--data", str(text)]
    steps = ["--max-steps", "1", "--max-length", "16", "--batch-size", "1"]
    verbs = [
        ["train", str(folder), str(tmp_path / "tuned"), *data, *steps, *cache],
        ["quantize", str(folder), str(tmp_path / "q"), "--scheme", "int4-gptq", "--calib", str(text),
         "--calib-tokens", "64"],
        ["onnx", str(tmp_path / "q"), str(tmp_path / "device")],
        ["eval", str(folder), *data, "--max-length", "16"],
        ["eval", str(tmp_path / "device"), *data, "--max-length", "16"],
        ["run", str(tmp_path / "device"), "The [PAD] mill", "-n", "2"],
    ]  # fmt: skip
    for verb in verbs:
        assert main(verb) == 0, verb
    err = capsys.readouterr().err
    assert err.count("none for [PAD] (300)") == 1
    ids = load_tokenizer(folder).encode("<a>[PAD]").ids
    assert ids[0] == 299
    assert len(ids) > 2
    assert max(ids) < 300


def test_a_vocabulary_beyond_the_rows_is_refused_by_every_verb(gpt2_copy: Path, tmp_path: Path) -> None:
    edit_config(gpt2_copy, vocab_size=290)
    with pytest.raises(InputError, match=r"has ids up to 299, its model 290 tokens"):
        load_tokenizer(gpt2_copy)


# --- refused, and compared ------------------------------------------------------------------------------


def test_code_of_a_tokenizer_is_not_run(gpt2_copy: Path) -> None:
    settings_of(auto_map={"AutoTokenizer": ["tok.Tok", None]})(gpt2_copy)
    with one_line("auto_map"):
        load_tokenizer(gpt2_copy)


def test_files_of_a_later_transformers_are_not_called_damaged(gpt2_copy: Path) -> None:
    path = gpt2_copy / "tokenizer_config.json"
    path.write_text(json.dumps({"backend": "tokenizers", "extra_special_tokens": [USER]}))  # a list since 5.0
    if version("transformers") >= "5":
        assert load_tokenizer(gpt2_copy).token_to_id("<|endoftext|>") == 0
        return
    with pytest.raises(InputError, match="Transformers 5 wrote it and 4") as caught:
        load_tokenizer(gpt2_copy)
    assert "replace" not in str(caught.value)


def test_another_reading_of_a_text_is_stopped(gpt2_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate the effect of files that are not read."""
    real = verify_tokenizer.load_tokenizer

    def without_merge(folder: Path) -> Tokenizer:
        data = json.loads(real(folder).to_str())
        del data["model"]["merges"][0]
        return Tokenizer.from_str(json.dumps(data))

    monkeypatch.setattr(verify_tokenizer, "load_tokenizer", without_merge)
    with pytest.raises(ValidationError, match=r"differently from Transformers: from token \d+ on"):
        load_model(gpt2_copy)
