"""The evidence on speed: models that switch as designed, the peer interface, targets met and missed."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence import models, speed
from benchmarks.evidence.speed_report import Row, report, rows
from benchmarks.peers import registry
from benchmarks.peers.adapters import FACTS, llama_cpp_gguf, openvino_stateful, optimum_onnx
from benchmarks.peers.registry import PEERS, Peer, divergence, missing, prepare
from benchmarks.speed.cases import Case
from benchmarks.speed.processes import WorkerFailed, worker
from benchmarks.speed.results import Speed, Timings
from dmpt_export.cli.main import main
from tests.helpers.models import saved_model
from training.errors import InputError

TINY = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


# --- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("switching", ["never", "always", "natural", 0.2])
def test_rigged_gates_do_as_told_when_quantized(switching: Any, scheme: str, tmp_path: Path) -> None:
    import runtime
    from dmpt_export.onnx.export import export_onnx
    from quant.checkpoint import save_quantized

    models.make_dmpt(tmp_path / "model", models.Shape(4, switching), split=1, **{**TINY, "fast_k": 16})
    save_quantized(tmp_path / "model", tmp_path / "quantized", scheme=scheme)
    export_onnx(tmp_path / "quantized", tmp_path / "onnx", verify=False)
    ids = np.random.default_rng(0).integers(0, 300, 64)
    with runtime.load(tmp_path / "onnx", threads=1) as model:
        routes = model.score(ids)[1]
    changes = int(np.count_nonzero(np.diff(routes)))
    least, most = {"never": (0, 0), 0.2: (6, 20), "natural": (21, 42), "always": (63, 63)}[switching]
    assert least <= changes <= most


def test_the_whole_command_on_small_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MODELS", speed.MODELS[:2])
    known = {
        "transformers": Peer("tests.helpers.bench_fakes", ("fp32",), ("numpy",), ""),
        "openvino": Peer("no.module", ("int8",), ("no-such-package",), "pip install it"),
        "optimum": Peer("tests.helpers.bench_fakes", ("broken",), ("numpy",), ""),
    }
    monkeypatch.setattr(registry, "PEERS", known)
    monkeypatch.setattr("benchmarks.speed.timing.buffer_bytes", lambda: 1 << 20)
    monkeypatch.setattr(speed.Workshop, "cli", lambda _, *arguments: main(list(map(str, arguments))))
    options = ["--work", str(tmp_path), "--schemes", "int8", "--repetitions", "2"]
    speed.main(options, TINY)
    said = capsys.readouterr().out
    said = said[said.index("## 1 thread") :]
    assert "| DMPT int8: decode time over GPT-2 int8" in said
    assert "openvino is not measured" in said
    assert "optimum broken is not measured: optimum broken: cannot be converted" in said
    assert (tmp_path / "speed.md").read_text() == said
    stored = json.loads((tmp_path / "speed-1.json").read_text())
    assert [row["name"] for row in stored["models"]] == ["GPT-2 int8", "DMPT int8", "transformers fp32"]
    assert stored["agreement"]["transformers fp32"] == pytest.approx({"mean_kl": 0, "same_top": 1}, abs=1e-6)
    assert stored["agreement"]["GPT-2 int8"]["mean_kl"] > 0.1  # the fake says something else
    assert all(len(test["samples"]) == 2 for row in stored["models"] for test in row["tests"])
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "onnx").rglob("*")}
    speed.Workshop(tmp_path, TINY).ours(["int8"])  # nothing is made twice
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "onnx").rglob("*")} == made
    assert not list((tmp_path / "quantized").iterdir())


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (WorkerFailed("llama.cpp cannot be loaded", 5), 5, "Error: llama.cpp cannot be loaded"),
        (InputError("onnx is not an ONNX folder"), 3, "Error: onnx is not an ONNX folder"),
        (CalledProcessError(4, ["python", "-m", "dmpt_export", "onnx", "x"]), 4, "dmpt-export onnx failed"),
        (CalledProcessError(-9, ["python", "-m", "dmpt_export", "onnx", "x"]), 5, "dmpt-export onnx failed"),
    ],
)
def test_what_fails_is_one_line(
    error: Exception, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any) -> str:
        raise error

    monkeypatch.setattr(speed, "run", fail)
    with pytest.raises(SystemExit) as stopped:
        speed.main(["--work", str(tmp_path)])
    out, err = capsys.readouterr()
    assert stopped.value.code == code
    assert said in err
    assert out == ""


def test_a_half_made_checkpoint_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(out: Path, **_: Any) -> None:
        out.mkdir(parents=True)
        (out / "config.json").touch()
        raise KeyboardInterrupt

    shop = speed.Workshop(tmp_path, TINY)
    with monkeypatch.context() as patch:
        patch.setattr(models, "make_gpt2", stop)
        with pytest.raises(KeyboardInterrupt):
            shop.checkpoint(speed.MODELS[0])
    assert (shop.checkpoint(speed.MODELS[0]) / "model.safetensors").is_file()


def test_wrong_options_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--peer-python", "nobody=/x"], ["--peer-python", "openvino"], ["--schemes", "int3"]):
        with pytest.raises(SystemExit) as stopped:
            speed.main(["--work", str(tmp_path), *option])
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        speed.main(["--work", str(tmp_path), "--peer-python", "openvino=/no/python"], TINY)
    assert stopped.value.code == 3
    assert "openvino: /no/python cannot be started" in capsys.readouterr().err


# --- peers ------------------------------------------------------------------------------------------


@pytest.fixture
def fake_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("numpy", "no-such-package")
    monkeypatch.setitem(PEERS, "fake", Peer("tests.helpers.bench_fakes", ("q8",), packages, "pip install it"))


@pytest.mark.usefixtures("fake_peer")
def test_a_peer_is_converted_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("fake") == ["no-such-package"]
    with pytest.raises(WorkerFailed, match="it lacks no-such-package; pip install it"):
        prepare("fake", "q8", tmp_path / "gpt2", tmp_path / "out")
    monkeypatch.setitem(PEERS, "fake", replace(PEERS["fake"], packages=("numpy",)))
    found = prepare("fake", "q8", tmp_path / "gpt2", tmp_path / "out")
    assert (found.name, found.adapter, found.size_bytes, found.touched_bytes) == (
        "fake q8",
        "tests.helpers.bench_fakes",
        11,
        7,
    )
    facts = registry.read_facts(tmp_path / "out")
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["scheme"] == "q8"
    assert prepare("fake", "other", tmp_path / "gpt2", tmp_path / "out").size_bytes == 11  # not converted again
    with pytest.raises(WorkerFailed, match="fake broken: cannot be converted"):
        prepare("fake", "broken", tmp_path / "gpt2", tmp_path / "half")
    assert not (tmp_path / "half" / FACTS).exists()


def test_divergence_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    # 0.5 ln 2 + 0.5 ln(2/3) = 0.1438, and nothing in the second row
    assert divergence(reference, found) == pytest.approx({"mean_kl": 0.07192, "same_top": 0.5}, abs=1e-5)


def test_gguf_tensors_are_the_model_s(tiny_gpt2: Path) -> None:
    from safetensors.numpy import load_file

    source = load_file(tiny_gpt2 / "model.safetensors")
    found = dict(llama_cpp_gguf.tensors(tiny_gpt2))
    assert len(found) == 4 * 12 + 4 == len(source)
    np.testing.assert_array_equal(found["blk.3.ffn_up.weight"], source["transformer.h.3.mlp.c_fc.weight"].T)
    np.testing.assert_array_equal(found["blk.0.attn_norm.bias"], source["transformer.h.0.ln_1.bias"])
    np.testing.assert_array_equal(found["token_embd.weight"], source["transformer.wte.weight"])


def test_the_position_embedding_is_not_touched(tmp_path: Path) -> None:
    """Names as the exporters write them; its scales and zero points do not count either."""
    from onnx import TensorProto, helper, save

    (tmp_path / "model.xml").write_text(
        '<net><layers><layer name="self.transformer.wpe.weight" type="Const"><data shape="64, 32" size="2048"/></layer>'
        '<layer name="self.transformer.wpe.weight/scale" type="Const"><data size="128"/></layer>'
        '<layer name="self.transformer.wpe.weight/multiply" type="Multiply"><data auto="numpy"/></layer>'
        '<layer name="self.transformer.wte.weight" type="Const"><data size="9"/></layer></layers></net>'
    )
    assert openvino_stateful.position_bytes(tmp_path / "model.xml") == 2048 + 128
    sizes = {"transformer.wpe.weight_quantized": 2048, "transformer.wpe.weight_scale": 4, "transformer.wte.weight": 9}
    tensors = [helper.make_tensor(name, TensorProto.UINT8, [n], bytes(n), raw=True) for name, n in sizes.items()]
    save(helper.make_model(helper.make_graph([], "g", [], [], tensors)), tmp_path / "model.onnx")
    assert optimum_onnx.position_bytes(tmp_path / "model.onnx") == 2048 + 4


@pytest.mark.parametrize(
    ("name", "scheme"), [(name, scheme) for name, peer in PEERS.items() for scheme in peer.schemes]
)
def test_a_peer_says_what_transformers_says(name: str, scheme: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    for package in PEERS[name].packages:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed: {PEERS[name].install}")
    import torch
    from transformers import GPT2LMHeadModel

    found = prepare(name, scheme, tiny_gpt2, tmp_path / "out")
    ids = np.random.default_rng(0).integers(0, 300, 40).tolist()
    with worker(name) as w:
        assert registry.load(w, found, 1)["context"] == 64
        w.ask(do="prefill", ids=ids[:5])  # leaves no trace
        w.ask(do="score", ids=ids, last=20, out=str(tmp_path / "scores.npy"))
        reply = w.ask(do="decode", ids=ids, n=10)
    scores = np.load(tmp_path / "scores.npy", allow_pickle=False)
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tiny_gpt2)(torch.tensor([ids])).logits[0, -20:].log_softmax(-1)
    assert divergence(expected.numpy(), scores)["mean_kl"] < (1e-6 if scheme == "fp32" else 0.5)
    assert len(reply["ids"]) == 10
    assert reply["seconds"] > 0
    assert reply["ids"][0] == int(scores[-1].argmax())


# --- the report -------------------------------------------------------------------------------------


def timed(name: str, decode: float, prefill: float = 100.0, **fields: Any) -> Speed:
    tests = [
        Timings(Case("pp", 512), [prefill] * 3),
        Timings(Case("tg", 128, 128), [decode, 2 * decode, decode / 2], [0.99] * 3),
        Timings(Case("tg", 128, 896), [decode / 1.5, 2 * decode / 1.5, decode / 3], [0.99] * 3),
    ]
    sizes = {"rss_bytes": 120, "peak_rss_bytes": 130, "size_bytes": 100, "threads": 1, "touched_bytes": 10}
    return Speed(name, tests, [1.0], **{**sizes, "read_bytes_per_s": {1: [1000.0, 2000.0, 500.0]}, **fields})


def found(*speeds: Speed) -> dict[str, Row]:
    return {row.what: row for row in rows(speeds)}


def test_every_target_is_met_missed_or_not_measured() -> None:
    table = found(
        timed("GPT-2 int8", 55), timed("DMPT int8", 50, 70), timed("openvino int8", 40, 100),
        timed("DMPT never int8", 50), timed("DMPT always int8", 39), timed("DMPT K=64 int8", 100),
    )  # fmt: skip
    wanted = {
        "DMPT int8: decode time over GPT-2 int8": (1.1, True),
        "int8: switching always over never": (50 / 39, False),
        "int8: 16 heads over 8": (None, None),
        "int8: K 64 over 256": (0.5, None),
        "DMPT int8: decode time at context 1000 (896 to 1024) over 128 (128 to 256)": (1.5, False),
        "DMPT int8: tokens/s over openvino int8": (1.25, True),
        "DMPT int8: prefill over openvino int8": (0.7, False),
        "DMPT int8: share of the memory roof": (0.5, False),
        "DMPT int8: resident memory over file size": (1.2, True),
        "DMPT int8: Python in a step": (0.01, True),
    }
    for what, (value, met) in wanted.items():
        assert table[what].met is met, what
        assert table[what].value == (None if value is None else pytest.approx(value)), what
    assert not [what for what in table if "int4" in what]


def test_the_report_says_what_was_missed_and_what_is_absent() -> None:
    switched = [Timings(Case("pp", 8), [1.0]), Timings(Case("tg", 64, 128), [1.0], switches=3)]
    odd = Speed("DMPT never int8", switched, [1.0], 1, 1, 1, 1)
    said = report([timed("GPT-2 int8", 60), timed("DMPT int8", 50)], {}, ["llama.cpp is not measured"])
    assert "Missed: DMPT int8: decode time over GPT-2 int8;" in said
    assert "llama.cpp is not measured" in said
    assert "switched" not in said
    assert "DMPT never int8 switched 3 times" in report([odd], {}, [])


def test_saved_models_stay_what_they_are(tmp_path: Path) -> None:
    """Setting routes changes only the marked channels: head rows and path blocks of a plain model stay."""
    from training.checkpoints.checkpoint import load_model

    model = load_model(saved_model(tmp_path / "model", [2], 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.rig(model, "always")
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert not [name for name in changed if name.startswith(("paths", "heads", "head_gates"))]
