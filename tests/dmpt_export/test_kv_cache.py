"""An int8 KV cache: its scales, that the runtime drives it like any other, and the faults that its check finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import dmpt_export.onnx.export as export_module
import runtime
from dmpt_export.check.tolerances import KV_INT8, TOLERANCES
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from dmpt_export.onnx.kv_cache import ROOM, SEED, SEQUENCES, calibrate
from dmpt_export.requests.onnx import CALIBRATED, first_ids
from quant.checkpoint import dequantized_model, save_quantized
from runtime import session
from runtime.model import Model
from tests.helpers.models import random_model, saved_model
from training.checkpoints.checkpoint import save_model
from training.errors import InputError, ValidationError
from training.text.tokenizer import load_tokenizer
from training.text.windows import first_tokens

TREES: dict[str, dict[str, Any]] = {
    "none": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 8, "fast_k": 16},
    "quad": {"splits": [1, 2], "heads": 4},
}
IDS = np.random.default_rng(4).integers(0, 97, 60)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports with an int8 cache, by tree."""
    root = tmp_path_factory.mktemp("kv")
    for tree, fields in TREES.items():
        saved_model(root / tree, **fields)
        export_onnx(root / tree, root / f"{tree} onnx", ExportOptions(kv_cache="int8"), verify=False)
    return {tree: root / f"{tree} onnx" for tree in TREES}


def test_scales_are_each_channels_largest_value(tmp_path: Path) -> None:
    """Against keys and values computed from the block's input by hand."""
    source = saved_model(tmp_path / "source", **TREES["dual"])
    model, config = dequantized_model(source), random_model(**TREES["dual"]).config
    rng = np.random.default_rng(SEED)
    batch = torch.from_numpy(np.stack([rng.integers(0, 97, 64) for _ in range(SEQUENCES)]))
    scales = calibrate(source, config)
    with torch.inference_mode():
        x = model.embed(batch)
        for index in ("0", "1"):
            block = model.transformer.h[index]
            qkv = block.attn.c_attn(block.ln_1(x)).reshape(-1, 3, 32)
            for part, name in ((1, "k_scale"), (2, "v_scale")):
                want = qkv[:, part].abs().amax(0).numpy() * ROOM / 127
                np.testing.assert_allclose(scales[f"transformer.h.{index}.attn.{name}"], want, rtol=1e-5)
            x = block(x, None, None)
    assert len(scales) == 2 * (2 + 2 * 2)
    assert {s.shape for s in scales.values()} == {(32,)}


def test_given_text_sets_the_scales(tmp_path: Path) -> None:
    source, config = saved_model(tmp_path / "source", **TREES["none"]), random_model(**TREES["none"]).config
    name = "transformer.h.0.attn.k_scale"
    once, longer = (calibrate(source, config, IDS[:n])[name] for n in (5, 60))
    assert (once <= longer).all()
    assert (once < longer).any()
    read = np.resize(IDS, SEQUENCES * 64)
    want, got = (calibrate(source, config, ids) for ids in (read, np.append(read, [97, -1])))  # illegal, and not read
    assert want.keys() == got.keys()
    assert all((got[key] == want[key]).all() for key in want)
    for wrong, message in (([], "text is empty"), ([1, 97], "vocabulary of 97"), ([-1, 1], "vocabulary of 97")):
        with pytest.raises(InputError, match=message):
            calibrate(source, config, np.array(wrong))


@pytest.mark.parametrize("tree", TREES)
def test_whole_stepwise_chunked_rewound_and_batched_are_one(tree: str, folders: dict[str, Path]) -> None:
    """Codes do not depend on how the text arrives, so neither do the outputs."""
    with runtime.load(folders[tree], threads=1) as model:
        assert model.manifest.cache_dtype == "int8"
        want, routes = model.sequence().feed(IDS, last=60)
        sequence = model.sequence()
        sequence.feed(IDS[:20])
        sequence.rewind(7)
        got = [sequence.feed(IDS[7:18], last=11), *(sequence.feed([token]) for token in IDS[18:])]
        assert np.concatenate([g[1] for g in got]).tolist() == routes[7:].tolist()
        close(np.concatenate([g[0] for g in got]), want[7:])
        batch = model.batch(2)
        batch.feed([IDS[:9], IDS[:30]])
        batch.reorder([1, 0, 1])
        log_probs, taken = batch.step([IDS[30], IDS[9], IDS[30]])
        assert taken.tolist() == [routes[30], routes[9], routes[30]]
        close(log_probs, want[[30, 9, 30]])
        assert {b.host().dtype for b in batch.caches.buffers.values()} == {np.dtype(np.int8)}


def close(got: np.ndarray, want: np.ndarray) -> None:
    """A sum that rounds otherwise can move a code by one, hence not the float cache's tolerance."""
    kl = (np.exp(want) * (want - got)).sum(-1)
    assert kl.mean() < TOLERANCES[KV_INT8].kl_mean / 10


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize("tree", TREES)
def test_exports_are_checked_exactly_but_for_the_cache(tree: str, scheme: str | None, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES[tree])
    if scheme:
        save_quantized(source, tmp_path / "quantized", scheme=scheme)
        source = tmp_path / "quantized"
    manifest = export_onnx(source, tmp_path / "onnx", ExportOptions(kv_cache="int8"))
    parity = manifest["parity"]
    assert parity["float_kernels"]["whole"]["max_abs_diff"] < 1e-4 < parity["whole"]["max_abs_diff"]
    assert json.loads((tmp_path / "onnx" / "dmpt_manifest.json").read_text())["cache_dtype"] == "int8"
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)


@pytest.mark.parametrize("part", ["k_scale", "v_scale"])
def test_wrong_scales_fail_the_check(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved_model(tmp_path / "source", **TREES["dual"])

    def wrong(*args: Any) -> dict[str, np.ndarray]:
        return {name: s / 20 if name.endswith(part) else s for name, s in calibrate(*args).items()}

    monkeypatch.setattr(export_module, "calibrate", wrong)
    with pytest.raises(ValidationError, match="scored as a whole"):
        export_onnx(source, tmp_path / "onnx", ExportOptions(kv_cache="int8"))
    assert not (tmp_path / "onnx").exists()


def test_impossible_options(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", **TREES["dual"])
    with pytest.raises(InputError, match="int4"):
        export_onnx(source, tmp_path / "onnx", ExportOptions(kv_cache="int4"))
    with pytest.raises(InputError, match="calib is for kv_cache int8"):
        export_onnx(source, tmp_path / "onnx", calibration=IDS)
    with pytest.raises(InputError, match="target cpu"):
        export_onnx(source, tmp_path / "onnx", ExportOptions(target="cuda", kv_cache="int8"))


def test_the_command_calibrates_on_a_text(tiny_dmpt: Path, sample_text: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(sample_text)
    (tmp_path / "empty").write_text("\n")
    options = ["onnx", str(tiny_dmpt), str(tmp_path / "onnx"), "--kv-cache", "int8"]
    assert main([*options, "--calib", str(tmp_path / "empty")]) == 3
    assert main([*options, "--calib", ""]) == 3
    assert main([*options[:3], "--calib", str(tmp_path / "text")]) == 2
    ids = first_tokens(tmp_path / "text", load_tokenizer(tiny_dmpt), 0, SEQUENCES * 64)
    assert (first_ids(str(tiny_dmpt), str(tmp_path / "text"), CALIBRATED) == ids).all()
    assert len(ids) == SEQUENCES * 64
    assert main([*options, "--calib", str(tmp_path / "text")]) == 0
    with runtime.load(tmp_path / "onnx", threads=1) as model:
        assert isinstance(model, Model)
        assert model.manifest.cache_dtype == "int8"
        assert len(model.generate(model.encode("The"), max_new_tokens=5)) == 5


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_an_export_needs_less_than_two_float_models(scheme: str | None, tmp_path: Path) -> None:
    """Calibrating, building and checking release their memory one after the other; measured by the process's peak.

    The model is large beside what the libraries take at first use, some 35 MB on some processors.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of resident memory is read from /proc")
    model = random_model([1], 4, n_embd=384, n_head=6, vocab_size=8000, n_layer=3, std=0.02)
    save_model(model, tmp_path / "source")
    size = sum(p.numel() * 4 for p in model.parameters()) >> 20
    if scheme:
        save_quantized(tmp_path / "source", tmp_path / "quantized", scheme=scheme)
    source = tmp_path / ("quantized" if scheme else "source")
    code = (
        "import torch, onnxruntime, runtime, dmpt_export.check.verify, quant.reference\n"
        "from dmpt_export.onnx.export import export_onnx\n"
        "from dmpt_export.onnx.exportable import ExportOptions\n"
        "def peak():\n"
        "    lines = [line.split() for line in open('/proc/self/status')]\n"
        "    return next(int(line[1]) >> 10 for line in lines if line[0] == 'VmHWM:')\n"
        "before = peak()\n"
        f"export_onnx({str(source)!r}, {str(tmp_path / 'onnx')!r}, ExportOptions(kv_cache='int8', atol=1e-3))\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert size > 90
    assert int(done.stdout) < 2 * size


@pytest.mark.parametrize(
    ("cache", "before", "inside"),
    [("float32", None, None), ("float16", None, None), ("int8", None, "1"), ("float32", "1", "1"), ("int8", "0", "0")],
)
def test_attention_is_untiled_for_an_int8_cache_alone(
    cache: str, before: str | None, inside: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(session.UNTILED, raising=False)
    if before is not None:
        monkeypatch.setenv(session.UNTILED, before)
    with session.attention_kernel(SimpleNamespace(cache_dtype=cache)):  # type: ignore[arg-type]
        assert os.environ.get(session.UNTILED) == inside
    assert os.environ.get(session.UNTILED) == before
