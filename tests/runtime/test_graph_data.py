"""The data files that a graph names are found wherever onnx.proto3 lets a tensor stand, and nothing else is."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from runtime.errors import ModelError
from runtime.files import check_data
from runtime.graph_data import data_files

Plant = Callable[[onnx.ModelProto, TensorProto], object]


def outside(location: str) -> TensorProto:
    """A tensor whose data is in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("checksum", "no-file")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model() -> onnx.ModelProto:
    """A graph with what may look like a data file and is none."""
    node = helper.make_node("Identity", ["x"], ["location"], name="location", doc_string="a/file")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "location"))
    made = helper.make_model(helper.make_graph([node], "location", [x], [y]))
    helper.set_model_props(made, {"location": "not-a-file"})
    made.graph.initializer.append(helper.make_tensor("location", TensorProto.FLOAT, [1], [1.0]))
    return made


def sparse(tensor: TensorProto, part: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(**{part: tensor}, dims=[1])


def in_branch(m: onnx.ModelProto, tensor: TensorProto) -> None:
    """Two levels deep."""
    inner = onnx.GraphProto(initializer=[tensor])
    middle = onnx.GraphProto(node=[onnx.NodeProto(attribute=[onnx.AttributeProto(name="then_branch", g=inner)])])
    m.graph.node.add().attribute.add(name="else_branch").g.CopyFrom(middle)


PLACES: dict[str, Plant] = {
    "initializer": lambda m, t: m.graph.initializer.append(t),
    "sparse values": lambda m, t: m.graph.sparse_initializer.append(sparse(t, "values")),
    "sparse indices": lambda m, t: m.graph.sparse_initializer.append(sparse(t, "indices")),
    "attribute": lambda m, t: m.graph.node[0].attribute.add(name="value").t.CopyFrom(t),
    "attribute, several": lambda m, t: m.graph.node[0].attribute.add(name="v").tensors.append(t),
    "attribute, sparse": lambda m, t: (
        m.graph.node[0].attribute.add(name="v").sparse_tensor.CopyFrom(sparse(t, "values"))
    ),
    "attribute, several sparse": lambda m, t: (
        m.graph.node[0].attribute.add(name="v").sparse_tensors.append(sparse(t, "values"))
    ),
    "branch of a branch": in_branch,
    "one of several graphs": lambda m, t: m.graph.node[0].attribute.add(name="v").graphs.add().initializer.append(t),
    "function": lambda m, t: m.functions.add().node.add().attribute.add(name="value").t.CopyFrom(t),
    "default of a function": lambda m, t: m.functions.add().attribute_proto.add(name="value").t.CopyFrom(t),
    "training": lambda m, t: m.training_info.add().algorithm.initializer.append(t),
    "start of training": lambda m, t: m.training_info.add().initialization.initializer.append(t),
}
NAMES = ["../secret", "a/../../secret", "/etc/passwd", "sub/w.data", "C:\\secret", "*/_ORT_MEM_ADDR_/*", "unlisted", ""]


def saved(folder: Path, *tensors: TensorProto, plant: Plant = PLACES["initializer"]) -> Path:
    made = model()
    for tensor in tensors:
        plant(made, tensor)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return folder


def sized(message: bytes) -> bytes:
    """A message with its length in front, in two bytes."""
    return bytes([len(message) % 128 | 128, len(message) >> 7]) + message


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_is_found_in_every_place(place: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, outside("w.data"), plant=PLACES[place])
    assert data_files(folder / "model.onnx") == {"w.data"}
    check_data(folder, ["model.onnx"], ["model.onnx", "w.data", "tokenizer.json"])
    with pytest.raises(ModelError, match=r"takes data from 'w\.data', which its manifest does not list"):
        check_data(folder, ["model.onnx"], ["model.onnx", "tokenizer.json"])


def test_the_places_are_all_that_onnx_has(tmp_path: Path) -> None:
    """A field of the installed onnx that leads to tensors, and that this reader does not follow, is found here."""
    from runtime.graph_data import FIELDS, MODEL

    kinds = {
        "GraphProto": "graph", "TrainingInfoProto": "training", "FunctionProto": "function", "NodeProto": "node",
        "AttributeProto": "attribute", "SparseTensorProto": "sparse", "TensorProto": "tensor", "ModelProto": MODEL,
    }  # fmt: skip
    for name, kind in kinds.items():
        fields = getattr(onnx, name).DESCRIPTOR.fields
        wanted = {
            f.number: kinds[f.message_type.name] for f in fields if f.message_type and f.message_type.name in kinds
        }
        wanted |= {f.number: "entry" for f in fields if f.name == "external_data"}
        assert FIELDS[kind] == wanted


def test_a_graph_without_data_files_names_none(tmp_path: Path) -> None:
    assert data_files(saved(tmp_path) / "model.onnx") == set()


@pytest.mark.parametrize("name", NAMES)
def test_names_that_the_manifest_does_not_list_are_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, outside("w.data"), outside(name))
    with pytest.raises(ModelError, match="which its manifest does not list: do not use") as caught:
        check_data(folder, ["model.onnx"], ["model.onnx", "w.data"])
    assert repr(name) in str(caught.value)


def test_every_location_of_an_entry_counts(tmp_path: Path) -> None:
    """Where a field occurs twice, readers take the last; where a key does, ONNX Runtime does."""
    tensor = outside("w.data")
    tensor.external_data.add(key="location", value="second")
    entry = b"\x0a\x01x" + b"\x12\x05third" + b"\x0a\x08location" + b"\x12\x06fourth"  # key and value twice
    initializer = tensor.SerializeToString() + b"\x6a" + bytes([len(entry)]) + entry
    second = b"\x3a" + sized(b"\x2a" + sized(initializer))  # another field `graph` of the model
    (tmp_path / "model.onnx").write_bytes(model().SerializeToString() + second)
    assert data_files(tmp_path / "model.onnx") == {"w.data", "second", "third", "fourth"}


def test_listed_files_that_no_graph_names_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, outside("w.data"))
    listed = ["model.onnx", "w.data", "README.md", "tokenizer.json", "tokenizer_config.json"]
    check_data(folder, ["model.onnx"], [*listed, "quantization_report.json"])
    with pytest.raises(ModelError, match=r"lists 'model\.onnx\.more', which its graph does not name"):
        check_data(folder, ["model.onnx"], [*listed, "model.onnx.more"])


def test_graphs_in_subfolders_name_files_beside_them(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    saved(tmp_path / "onnx", outside("w.data"))
    saved(tmp_path, outside("onnx/w.data"))
    graphs = ["model.onnx", "onnx/model.onnx"]
    check_data(tmp_path, graphs, [*graphs, "onnx/w.data"])
    saved(tmp_path / "onnx", outside("../w.data"))
    with pytest.raises(ModelError, match=r"'onnx/\.\./w\.data'"):
        check_data(tmp_path, graphs, [*graphs, "onnx/w.data", "w.data"])


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "model.onnx").rename(tmp_path / "model.ort")
    with pytest.raises(ModelError, match=r"not an \.onnx file"):
        check_data(tmp_path, ["model.ort"], ["model.ort"])


@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_give_names_or_an_error_for_people(noise: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = saved(Path(place), outside("w.data")) / "model.onnx"
        whole = path.read_bytes()
        path.write_bytes(whole[:cut] + noise + whole[cut:])
        with contextlib.suppress(ModelError):
            assert all(isinstance(name, str) for name in data_files(path))
