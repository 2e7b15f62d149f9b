"""Loading: damaged or malicious folders, missing packages and GPUs, freeing memory, and imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import runtime
from dmpt_export.onnx.export import export_onnx
from runtime import session
from runtime.errors import ModelError, OutOfMemory, RequestError, SetupError
from runtime.files import sha256
from runtime.manifest_file import MANIFEST_NAME
from runtime.ort import import_onnxruntime


@pytest.fixture(scope="module")
def exported(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("load") / "onnx"
    export_onnx(tiny_dmpt, out, verify=False)
    return out


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        runtime.load(folder, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_NAME
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def publish(folder: Path, model: onnx.ModelProto) -> None:
    """Save a changed graph and adapt the manifest to it, as an attacker would."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    edit_manifest(
        folder, lambda raw: raw["files"].update({path.name: {"sha256": sha256(path), "size": path.stat().st_size}})
    )


def point_data(folder: Path, **entries: str) -> None:
    """Change the data location of the first external tensor."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    present = {entry.key: entry for entry in tensor.external_data}
    for key, value in entries.items():
        present[key].value = value
    publish(folder, model)


def test_a_folder_from_a_text_path_loads_and_reports(exported: Path) -> None:
    with runtime.load(str(exported), threads=1) as model:
        assert (model.context, model.vocab_size, model.threads, model.device) == (64, 300, 1, "cpu")
        assert model.manifest.raw["format"] == "dmpt-onnx"
        assert model.manifest.leaves == ("left", "right")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_every_file_is_verified(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert f"{name} has a different sha256" in refusal(folder)


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_truncated_graph_that_the_manifest_agrees_with_is_refused(size: int, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:size])
    edit_manifest(folder, lambda raw: raw["files"].update({path.name: {"sha256": sha256(path), "size": size}}))
    assert "cannot load" in refusal(folder)


@pytest.mark.parametrize("location", ["../outside", "a/../../outside", "{outside}", "C:\\outside", "..\\outside"])
def test_data_outside_the_folder_is_refused(location: str, folder: Path) -> None:
    outside = shutil.copy(folder / "model.onnx.data", folder.parent / "outside")
    point_data(folder, location=location.format(outside=outside))
    assert "cannot load" in refusal(folder)


@pytest.mark.parametrize("location", ["/etc/hostname", "../outside", "inside/data", "*/_ORT_MEM_ADDR_/*", "notes.txt"])
@pytest.mark.parametrize("where", ["initializer", "branch"])
def test_data_that_the_manifest_does_not_list_is_refused_before_it_is_opened(
    where: str, location: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "inside").mkdir()
    for name in ("inside/data", "notes.txt", "../outside"):
        shutil.copy(folder / "model.onnx.data", folder / name)
    if where == "initializer":
        point_data(folder, location=location)
    else:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
        tensor = branch.initializer.add(name="secret", data_type=onnx.TensorProto.UINT8, dims=[1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        publish(folder, model)
    monkeypatch.setattr(session, "import_onnxruntime", lambda device: pytest.fail("it went on to ONNX Runtime"))
    assert f"takes data from {location!r}, which its manifest does not list" in refusal(folder)
    assert "which its manifest does not list" in refusal(folder, verify=False)


def test_a_listed_file_that_the_graph_does_not_name_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.onnx.data", folder / "model.onnx.more")
    edit_manifest(folder, lambda raw: raw["files"].update({"model.onnx.more": raw["files"]["model.onnx.data"]}))
    assert "lists 'model.onnx.more', which its graph does not name" in refusal(folder)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_data_behind_a_link_is_refused(link: Callable[[str, Path], None], folder: Path) -> None:
    outside = shutil.copy(folder / "model.onnx.data", folder.parent / "outside")
    link(outside, folder / "inside")
    point_data(folder, location="inside")
    assert "inside is a symbolic or hard link" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-4096"), ("offset", "-1"), ("offset", "99999999999"), ("offset", str(2**64)), ("offset", "x"),
     ("length", "-1"), ("length", "8"), ("length", "99999999999"), ("length", str(2**64))],
)  # fmt: skip
def test_data_out_of_range_is_refused(key: str, value: str, folder: Path) -> None:
    point_data(folder, **{key: value})
    assert "cannot load" in refusal(folder)


def test_a_graph_that_is_not_the_manifests_is_refused(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, [1]))
    past = next(i for i in model.graph.input if i.name.startswith("past."))
    past.type.tensor_type.shape.dim[1].dim_value = 299
    publish(folder, model)
    message = refusal(folder)
    assert "extra is not in the manifest" in message
    assert f"{past.name} is float32" in message


def test_sizes_in_the_manifest_must_be_the_graphs(folder: Path) -> None:
    def eight_heads(raw: dict[str, Any]) -> None:
        raw["config"] |= {"n_head": 8, "head_dim": raw["config"]["n_embd"] // 8}
        for spec in [*raw["inputs"], *raw["outputs"]]:
            if spec["name"].startswith(("past", "present")):
                spec["shape"][1::2] = [8, raw["config"]["head_dim"]]

    edit_manifest(folder, eight_heads)
    assert "past.transformer.h.0.key is float32" in refusal(folder)


@pytest.mark.parametrize("kind", ["checkpoint", "empty", "file"])
def test_what_is_no_exported_model(kind: str, tiny_dmpt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    message = refusal(tiny_dmpt if kind == "checkpoint" else tmp_path / kind)
    assert "dmpt-export onnx" in message


@pytest.mark.parametrize("device", ["gpu", "CPU", "cuda:0", None])
def test_unknown_devices(device: Any, exported: Path) -> None:
    with pytest.raises(RequestError, match="choose one of cpu, cuda"):
        runtime.load(exported, device=device)


def test_cuda_needs_an_export_for_it(exported: Path) -> None:
    assert "--target cuda" in refusal(exported, device="cuda")


def test_cuda_that_is_not_there_is_one_clear_error(folder: Path) -> None:
    if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    edit_manifest(folder, lambda raw: raw.update(target="cuda"))
    with pytest.raises(SetupError, match=r"has no CUDA.*pip install 'dmpt-export\[cuda\]'") as caught:
        runtime.load(folder, device="cuda")
    assert caught.value.exit_code == 3


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fallback_to_the_cpu_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate ONNX Runtime when a CUDA library does not load."""
    edit_manifest(folder, lambda raw: raw.update(target="cuda"))
    monkeypatch.setattr(session, "check_cuda", lambda *_: None)
    with pytest.raises(SetupError, match="on the GPU alone"):
        runtime.load(folder, device="cuda")


def test_missing_onnxruntime_is_one_clear_error(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SetupError, match=r"pip install 'dmpt-export\[cpu\]'") as caught:
        runtime.load(exported)
    assert caught.value.exit_code == 3


def test_a_closed_model_says_so(exported: Path) -> None:
    with runtime.load(exported, threads=1) as model:
        sequence = model.sequence()
        sequence.feed([1])
    calls: list[Callable[[], Any]] = [
        lambda: sequence.feed([2]), lambda: model.log_probs([1]), lambda: model.generate([1])
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RequestError, match="closed"):
            call()
    model.close()


def test_failures_inside_a_run_are_model_errors(exported: Path) -> None:
    with runtime.load(exported, threads=1) as model:
        sequence = model.sequence()
        sequence.reserve(1)
        sequence.binding.bind_input("input_ids", "cpu", 0, np.int64, (1, 1), sequence.ids.ctypes.data)
        with pytest.raises(ModelError, match="failed to run"):
            model.engine.run(sequence.binding)  # the other inputs are not bound


def test_memory_that_runs_out_has_its_own_error() -> None:
    error = session.explained(RuntimeError("BFCArena: Failed to allocate memory for requested buffer"), "a run")
    assert isinstance(error, OutOfMemory)
    assert isinstance(error, MemoryError)
    assert error.exit_code == 5


def test_closing_frees_the_weights_at_once(tmp_path: Path, make_gpt2: Callable[..., Any]) -> None:
    """Also while sequences, batches and unfinished texts exist: measured as resident memory of the process."""
    make_gpt2(tmp_path / "source", n_embd=512, vocab_size=300, n_layer=8)  # 8 * 12 * 512 * 512 floats: 100 MB
    export_onnx(tmp_path / "source", tmp_path / "onnx", verify=False)
    code = (
        "import runtime\n"
        "def held():\n"
        "    lines = [line.split() for line in open('/proc/self/status') if 'kB' in line]\n"
        "    pages = {line[0]: int(line[1]) >> 10 for line in lines}\n"
        "    return pages['RssAnon:'] + pages['RssFile:']\n"
        f"model = runtime.load({str(tmp_path / 'onnx')!r}, threads=1)\n"
        "sequence, batch, text = model.sequence(), model.batch(2), iter(model.stream([1, 2], 9))\n"
        "sequence.feed([1]), batch.feed([[1], [2]]), next(text)\n"
        "used = held()\n"
        "model.close()\n"
        "print(used - held())\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    assert int(python(code)) > 80


def test_closing_while_another_thread_binds(exported: Path) -> None:
    """A binding under construction when the engine closes is revoked, too: close() waits for it."""
    model = runtime.load(exported, threads=1)
    engine, making, made = model.engine, threading.Event(), []

    class Slow:
        """onnxruntime with slow bindings."""

        def IOBinding(self, session: Any) -> object:
            making.set()
            time.sleep(0.2)
            return object()

    engine._ort = Slow()
    thread = threading.Thread(target=lambda: made.append(engine.binding()))
    thread.start()
    making.wait()
    model.close()
    thread.join()
    assert made[0].inner is None
    with pytest.raises(RequestError, match="closed"):
        engine.binding()


def test_released_models_do_not_pile_up(exported: Path) -> None:
    """The graph is freed with close(), although a sequence still holds its caches."""
    model = runtime.load(exported, threads=1)
    sequence = model.sequence()
    sequence.feed([1])
    model.close()
    assert model.engine._session is None
    assert sequence.length == 1


BLOCKED = (
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnx_ir",
    "accelerate",
    "huggingface_hub",
    "training",
    "quant",
)


def python(code: str) -> str:
    """Run code where the training side is not installed; its stdout."""
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in BLOCKED)
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_works_where_torch_is_not_installed(exported: Path) -> None:
    code = (
        "import runtime\n"
        f"with runtime.load({str(exported)!r}, threads=1) as model:\n"
        "    print(model.log_probs([1, 2, 3]).shape, len(model.routes([4, 5])), len(model.generate([5], 6)))\n"
    )
    assert python(code) == "(3, 300) 2 6\n"


def test_importing_runtime_is_light() -> None:
    heavy = ("numpy", "onnxruntime", "tokenizers")
    code = f"import runtime, runtime.manifest\nprint([name for name in {heavy} if name in sys.modules])"
    assert python(code) == "[]\n"
