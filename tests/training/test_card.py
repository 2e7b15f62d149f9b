"""Model cards: YAML that every reader takes as meant, and what a model takes over from its source's card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import STANDARD, ExportOptions
from quant.checkpoint import save_quantized
from training.checkpoints.card import CARD, card_text, inherited, model_fields, title
from training.checkpoints.checkpoint import load_model, save_model

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # what a file's name can hold, and more
VALUES = st.recursive(
    TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=4).filter(lambda many: not any(isinstance(one, list) for one in many))
        | st.dictionaries(st.from_regex(r"[a-z][a-z_]{3,8}", fullmatch=True), inner, min_size=1, max_size=4)
    ),
    max_leaves=12,
)
PARENT = """---
license: other
license_name: 'a "license": of ours'
language:
- en
- de
datasets: [openwebtext]
base_model: someone/older
widget:
- text: hello
---
# A card
"""


def metadata(folder: Path) -> dict[str, Any]:
    """As the hub reads it; nothing may be dropped on the way."""
    return dict(ModelCard((folder / CARD).read_text(encoding="utf-8")).data.to_dict())


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{3,8}", fullmatch=True), VALUES, max_size=5))
def test_yaml_is_read_back_as_it_was_meant(fields: dict[str, Any]) -> None:
    text = card_text(fields, "# body\n")
    front = text.removeprefix("---\n").removesuffix("---\n# body\n")
    assert (yaml.safe_load(front) or {}) == fields
    assert not {"---", "..."} & set(front.splitlines())  # the end of the metadata


@pytest.mark.parametrize(
    "word", ["no", "True", "null", "1e3", "0x1f", "2026-01-01", "~", "a: b", "- a", "#a", "é", " a"]
)
def test_texts_stay_texts(word: str) -> None:
    assert yaml.safe_load(card_text({"tags": [word], "license": word}, "").split("---\n")[1]) == {
        "license": word,
        "tags": [word],
    }


@given(TEXTS)
def test_the_title_is_one_line(name: str) -> None:
    assert len(title(name).splitlines()) == 1


def test_a_checkpoint_states_what_is_known(tiny_dmpt: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    assert metadata(tiny_dmpt) == {
        "library_name": "dmpt-export",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "dmpt"],
    }
    assert inherited(tiny_gpt2) == inherited(tmp_path / "nowhere") == {}


def test_license_and_base_pass_from_model_to_model(gpt2_copy: Path, tmp_path: Path) -> None:
    (gpt2_copy / CARD).write_text(PARENT)
    known = {name: value for name, value in yaml.safe_load(PARENT.split("---")[1]).items() if name != "widget"}
    odd = tmp_path / 'a "b": c\n---\n- d'
    save_model(load_model(gpt2_copy), odd, gpt2_copy, source=gpt2_copy)
    assert metadata(odd) == known | model_fields(["gpt2"], {})
    save_quantized(odd, tmp_path / "small", "int8")
    assert metadata(tmp_path / "small") == known | model_fields(["gpt2", "quantized", "int8"], {})
    export_onnx(tmp_path / "small", tmp_path / "device", verify=False, name=odd.name)
    assert metadata(tmp_path / "device") == known | model_fields(["onnx", "gpt2", "quantized", "int8"], {})
    assert '# a "b": c --- - d: ONNX\n' in (tmp_path / "device" / CARD).read_text()


def test_a_folder_for_other_programs_does_not_name_our_library(tiny_gpt2: Path, tmp_path: Path) -> None:
    export_onnx(tiny_gpt2, tmp_path / "device", ExportOptions(layout=STANDARD), verify=False)
    assert metadata(tmp_path / "device") == model_fields(["onnx", "gpt2"], {}, "onnx")


def test_a_model_of_the_hub_is_the_base(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots" / "607a30d"
    snapshot.mkdir(parents=True)
    assert inherited(snapshot) == {"base_model": "openai-community/gpt2"}
    (snapshot / CARD).write_text(PARENT)
    assert inherited(snapshot)["base_model"] == "openai-community/gpt2"
    assert inherited(snapshot)["license"] == "other"


@pytest.mark.parametrize(
    "front",
    [
        "license: [mit", "license: {a: b}", "license: 3", "- license", "license: ''", "base_model: /home/me/gpt2",
        "base_model: [someone/gpt2, ../gpt2]", "license: !!python/object:os.system x", "\x00", "a: &a [*a]",
    ],
)  # fmt: skip
def test_what_is_not_metadata_is_left_out(front: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(f"---\n{front}\n---\n")
    assert inherited(tmp_path) == {}


def test_cards_without_metadata(tmp_path: Path, make_gpt2: Callable[..., Any]) -> None:
    for text in ("", "# mit\n", "---\nlicense: mit\n", "text\n---\nlicense: mit\n---\n"):
        (tmp_path / CARD).write_text(text)
        assert inherited(tmp_path) == {}
    (tmp_path / CARD).write_bytes(b"---\r\nlicense: mit\r\n---\r\n")
    assert inherited(tmp_path) == {"license": "mit"}
    (tmp_path / CARD).write_bytes(b"---\nlicense: \xff\n---\n")
    assert inherited(tmp_path) == {}
