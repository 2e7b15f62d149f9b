"""The standard layout: every graph of a folder against torch, with padding, and the files that other programs read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from dmpt_export.check import verify
from dmpt_export.check.float_kernels import graphs, read_graph
from dmpt_export.check.standard import StandardModel
from dmpt_export.check.tolerances import TOLERANCES
from dmpt_export.cli.main import main
from dmpt_export.graph.standard import ALL, KEEP, LAST
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import STANDARD, ExportOptions
from quant.checkpoint import dequantized_model, save_quantized
from runtime.errors import ModelError
from tests.helpers.exports import TREES
from tests.helpers.models import saved_model
from training.errors import InputError, OptionError, ValidationError

EXACT = TOLERANCES[("float32", "float")].max_abs
STANDARDLY = ExportOptions(layout=STANDARD)
DUAL = TREES["dual, fast-k"]


def export(source: Path, out: Path, scheme: str | None = None, **options: Any) -> Path:
    if scheme is not None:
        save_quantized(source, out / "quantized", scheme)
        source = out / "quantized"
    export_onnx(source, out / "standard", ExportOptions(layout=STANDARD, **options), verify=False)
    return out / "standard"


def open_graph(folder: Path, rows: str) -> StandardModel:
    manifest = json.loads((folder / "dmpt_manifest.json").read_text())
    return StandardModel(folder / next(name for name, kind in manifest["graphs"].items() if kind == rows))


def torch_log_probs(source: Path, texts: list[list[int]]) -> list[np.ndarray]:
    """One-shot torch, each text alone: deployed log-probs [S, V]."""
    model = dequantized_model(source)
    with torch.inference_mode():
        return [model.log_probs(torch.tensor([ids]), fast_k=model.config.fast_k)[0].numpy() for ids in texts]


@pytest.fixture(scope="module", params=["gpt2", "multi-head", "quad, fast-k", "shared heads", "projected, one anchor"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    place = tmp_path_factory.mktemp("standard")
    source = saved_model(place / "source", **TREES[request.param])
    return source, export(source, place)


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, steps=st.integers(1, 5), left=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.parametrize("rows", [ALL, KEEP, LAST])
def test_padded_texts_give_what_each_gives_alone(
    made: tuple[Path, Path], rows: str, lengths: list[int], steps: int, left: bool, seed: int
) -> None:
    """Padding on either side; then single tokens, with the caches of before."""
    source, folder = made
    rng, longest = np.random.default_rng(seed), max(lengths)
    texts = [rng.integers(0, 50, n + steps).tolist() for n in lengths]
    want = torch_log_probs(source, texts)
    ids, mask = rng.integers(0, 50, (len(texts), longest)), np.zeros((len(texts), longest), np.int64)
    for row, n in enumerate(lengths):
        place = slice(longest - n, None) if left else slice(n)
        ids[row, place], mask[row, place] = texts[row][:n], 1
    with open_graph(folder, rows) as model:
        together = model.sequence(len(texts))
        log_probs, _ = together.step(ids, mask, keep=0)
        assert log_probs.shape[1] == (1 if rows == LAST else longest)
        for row, n in enumerate(lengths):
            got = log_probs[row] if rows == LAST else log_probs[row][mask[row] == 1]
            np.testing.assert_allclose(got, want[row][:n][-len(got) :], rtol=0, atol=EXACT)
        for i in range(steps):
            step = np.array([[text[n + i]] for text, n in zip(texts, lengths, strict=True)])
            log_probs, _ = together.step(step, np.ones_like(step), keep=1)
            for row, n in enumerate(lengths):
                np.testing.assert_allclose(log_probs[row, 0], want[row][n + i], rtol=0, atol=EXACT)


@pytest.mark.parametrize(("keep", "given"), [(0, 7), (1, 1), (3, 3), (7, 7), (50, 7)])
def test_transformers_js_gets_as_many_rows_as_it_asks_for(made: tuple[Path, Path], keep: int, given: int) -> None:
    source, folder = made
    ids = [3, 1, 4, 1, 5, 9, 2]
    with open_graph(folder, KEEP) as model:
        log_probs, _ = model.sequence().step(np.array([ids]), np.ones((1, 7), np.int64), keep=keep)
    want = torch_log_probs(source, [ids])[0][-given:]
    np.testing.assert_allclose(log_probs[0], want, rtol=0, atol=EXACT)


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "int8-dynamic", "fp16"])
def test_exports_in_every_storage_pass_the_check(scheme: str | None, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **DUAL)
    if scheme is not None:
        save_quantized(source, tmp_path / "quantized", scheme)
        source = tmp_path / "quantized"
    manifest = export_onnx(source, tmp_path / "standard", STANDARDLY)
    runs = [manifest["parity"], *([manifest["parity"]["float_kernels"]] if scheme not in (None, "fp16") else [])]
    assert all({"whole", "stepwise", "padded", "batch"} <= run.keys() for run in runs)
    assert set(manifest["parity"]["graphs"]) == set(manifest["graphs"]) - {"model.onnx"}


def without_mask(model: onnx.ModelProto) -> None:
    """Padding is seen."""
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            del node.input[7:]


def swapped_caches(model: onnx.ModelProto) -> None:
    """Keys of the first two layers come back as each other's."""
    first, second = (next(o for o in model.graph.output if o.name == f"present.{i}.key") for i in (0, 1))
    names = {first.name: second.name, second.name: first.name}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]


def late_padding(model: onnx.ModelProto) -> None:
    """One position is hidden that should be seen."""
    hidden = next(node for node in model.graph.node if node.name == "mask.hidden")
    hidden.input[0] = next(t.name for t in model.graph.initializer if t.name == "const.hidden")


@pytest.mark.parametrize("fault", [without_mask, swapped_caches, late_padding])
def test_planted_faults_are_found(
    fault: Callable[[onnx.ModelProto], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved_model(tmp_path / "source", **DUAL)
    export_onnx(source, tmp_path / "right", STANDARDLY)

    def spoilt(folder: Path, *rest: Any, **named: Any) -> Any:
        model = read_graph(folder / "model.onnx")
        fault(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return check(folder, *rest, **named)

    check = verify.check_export
    monkeypatch.setattr(verify, "check_export", spoilt)
    with pytest.raises(ValidationError):
        export_onnx(source, tmp_path / "wrong", STANDARDLY)
    assert not (tmp_path / "wrong").exists()


def test_the_weights_are_stored_once(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **DUAL)
    export_onnx(source, tmp_path / "native", verify=False)
    folder = export(source, tmp_path)
    native = (tmp_path / "native" / "model.onnx.data").stat().st_size
    [data] = (folder / "onnx").glob("*_data")
    assert data.stat().st_size <= 1.01 * native
    for name in json.loads((folder / "dmpt_manifest.json").read_text())["graphs"]:
        stored = [t for t in read_graph(folder / name).graph.initializer if t.external_data]
        places = {entry.value for t in stored for entry in t.external_data if entry.key == "location"}
        assert places == {data.name if name.startswith("onnx/") else f"onnx/{data.name}"}


@pytest.mark.parametrize(
    ("scheme", "file", "word"),
    [(None, "model.onnx", "fp32"), ("fp16", "model_fp16.onnx", "fp16"), ("int8", "model_quantized.onnx", "q8"),
     ("int4", "model_q4.onnx", "q4")],
)  # fmt: skip
def test_transformers_js_finds_its_file_by_type(scheme: str | None, file: str, word: str, tmp_path: Path) -> None:
    folder = export(saved_model(tmp_path / "source", **DUAL), tmp_path, scheme)
    assert {path.name for path in (folder / "onnx").iterdir()} == {file, f"{file}_data"}
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": word, "use_external_data_format": True}


def test_settings_describe_the_graphs(tiny_quad: Path, tmp_path: Path) -> None:
    """Each program reads how many caches there are from another file."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = export(tiny_quad, tmp_path)
    config, genai = AutoConfig.from_pretrained(folder), json.loads((folder / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    inputs = {value.name: value for value in read_graph(folder / "model.onnx").graph.input}
    layers = len([name for name in inputs if name.endswith(".key")])
    assert layers == 2 + 2 * 1 + 4 * 1  # trunk of two blocks, two nodes of one, four leaves of one
    assert config.model_type == "gpt2"
    assert config.n_layer == layers == decoder["num_hidden_layers"]
    assert {decoder["inputs"]["past_key_names"] % i for i in range(layers)} <= inputs.keys()
    heads, width = (inputs["past_key_values.0.key"].type.tensor_type.shape.dim[i].dim_value for i in (1, 3))
    assert (heads, width) == (decoder["num_key_value_heads"], decoder["head_size"]) == (4, 8)
    logits = read_graph(folder / decoder["filename"]).graph.output[0]
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1  # so genai knows that it gets last tokens alone
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("left", config.eos_token_id)
    assert set(tokenizer(["a b", "a b c d"], padding=True)) == {"input_ids", "attention_mask"}
    assert GenerationConfig.from_pretrained(folder).pad_token_id == config.eos_token_id
    assert f"\nKeys and values of a full context: {layers} layers, 0 MB of " in (folder / "README.md").read_text()


def test_the_version_that_has_the_bias_is_required(tmp_path: Path) -> None:
    """Measured: 1.20 and 1.21 refuse such a graph, 1.22 to 1.32 run it; the native layout runs with 1.20."""
    source = saved_model(tmp_path / "source", **DUAL)
    least = {
        layout: export_onnx(source, tmp_path / layout, ExportOptions(layout=layout), verify=False)["requires"]
        for layout in ("native", STANDARD)
    }
    assert least == {"native": {"onnxruntime": "1.20"}, STANDARD: {"onnxruntime": "1.22"}}
    assert "ONNX Runtime 1.22 or later" in (tmp_path / STANDARD / "README.md").read_text()


def test_every_path_is_counted(tiny_dmpt: Path, tmp_path: Path) -> None:
    """A step reads the blocks of all paths, so the report must not give one path's."""
    native = export_onnx(tiny_dmpt, tmp_path / "native", verify=False)
    standard = export_onnx(tiny_dmpt, tmp_path / "standard", STANDARDLY, verify=False)
    blocks = sum(
        tensor.numel() for name, tensor in dequantized_model(tiny_dmpt).named_parameters() if "paths.right.h" in name
    )
    touched = [manifest["parameters"]["touched_per_token"] for manifest in (native, standard)]
    assert touched[1] - touched[0] == blocks > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"target": "cuda"}, "cpu"), ({"kv_cache": "int8"}, "float caches"), ({"draft_vocab": 5}, "no draft heads")],
)
def test_what_other_programs_cannot_use_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExportOptions(layout=STANDARD, **options).check(verified=True, calibrated=False)


def test_each_layout_is_named_where_the_other_one_is_needed(
    tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["onnx", str(tiny_dmpt), str(tmp_path / "standard"), "--layout", "standard"]) == 0
    for command in (["run", "DEVICE", "a"], ["inspect", "DEVICE"], ["bench", "DEVICE"], ["eval", "DEVICE"]):
        line = [str(tmp_path / "standard") if word == "DEVICE" else word for word in command]
        capsys.readouterr()
        assert main([*line, "--data", __file__] if command[0] == "eval" else line) == 3
        assert "standard layout" in capsys.readouterr().err
    assert main(["onnx", str(tmp_path / "standard"), str(tmp_path / "again")]) == 3
    assert "not a checkpoint: open it with optimum" in capsys.readouterr().err
    with pytest.raises(ModelError, match="standard layout"):
        runtime.load(tmp_path / "standard")
    with pytest.raises(InputError, match="unknown layout 'flat'"):
        export_onnx(tiny_dmpt, tmp_path / "flat", ExportOptions(layout="flat"))


def test_an_earlier_folder_is_replaced_but_never_what_a_user_put_there(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = export(tiny_gpt2, tmp_path)
    export(tiny_gpt2, tmp_path)
    (folder / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="also holds onnx"):
        export(tiny_gpt2, tmp_path)


def test_a_leaf_without_rows_is_never_searched(tiny_dmpt: Path, tmp_path: Path) -> None:
    """TopK on no rows ends the process in ONNX Runtime before 1.31."""
    native, standard = tmp_path / "native", export(tiny_dmpt, tmp_path)
    export_onnx(tiny_dmpt, native, verify=False)
    for folder in (native, standard):
        found = [
            (graph.name, node.name)
            for graph in graphs(read_graph(folder / "model.onnx").graph)
            for node in graph.node
            if node.op_type == "TopK"
        ]
        assert found
        assert all(graph.endswith(".if_any.then") for graph, _ in found)


def test_genai_writes_what_the_runtime_writes(tiny_dmpt: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    export_onnx(tiny_dmpt, tmp_path / "native", verify=False)
    model = genai.Model(str(export(tiny_dmpt, tmp_path)))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=30, min_length=30)
    generator = genai.Generator(model, options)
    generator.append_tokens([5, 6, 7])
    while not generator.is_done():
        generator.generate_next_token()
    with runtime.load(tmp_path / "native") as ours:
        sequence, ids, new = ours.sequence(), [5, 6, 7], [5, 6, 7]
        while len(ids) < 30:
            new = [int(sequence.feed(new)[0][-1].argmax())]
            ids += new
    assert list(generator.get_sequence(0)) == ids
