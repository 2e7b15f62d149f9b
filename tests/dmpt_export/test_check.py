"""`dmpt-export check`: exit codes, the table, the JSON, and what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dmpt_export.onnx.export import export_onnx
from runtime.files import sha256
from runtime.manifest_file import MANIFEST_NAME
from tests.helpers.cli import TRAINING, run, run_without


@pytest.fixture(scope="module")
def device(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("check") / "device"
    export_onnx(tiny_dmpt, out)
    return out


@pytest.fixture
def broken(device: Path, tmp_path: Path) -> Path:
    """The same folder, as a processor would see it whose products are 1 % off."""
    out = tmp_path / "broken"
    out.mkdir()
    for path in device.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    data = out / "model.onnx.data"
    data.write_bytes((np.fromfile(data, np.float32) * np.float32(1.01)).tobytes())
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    manifest["files"][data.name]["sha256"] = sha256(data)
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    return out


def test_a_sound_device_passes(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", device, "--threads", 1) == 0
    out = capsys.readouterr().out
    assert "allowed: mean KL 1e-06, log-probs 0.0001, same top token 99%" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("te") or "token" in line[:8]] == [
        "PASS"
    ] * 3
    assert out.splitlines()[-1] == "PASS"


def test_a_device_that_computes_something_different_fails(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", broken, "--threads", 1) == 4
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "FAIL"
    assert shown.out.count("FAIL: ") == 3
    assert "this device computes something different from the export (text at once: " in shown.err


def test_json_says_the_same(device: Path, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", device, "--threads", 1, "--json") == 0
    good = json.loads(capsys.readouterr().out)
    assert run("check", broken, "--threads", 1, "--json") == 4
    bad = json.loads(capsys.readouterr().out)
    assert (good["passed"], bad["passed"]) == (True, False)
    assert set(good["parts"]) == set(bad["parts"]) == {"text at once", "token by token", "texts together"}
    assert good["routes"] == bad["routes"]
    assert sum(good["routes"].values()) == good["positions"] == 48
    assert bad["failure"].startswith("text at once: ")
    for name, part in good["parts"].items():
        assert part["kl_mean"] <= good["tolerance"]["kl_mean"] < bad["parts"][name]["kl_mean"]
        assert part["max_abs_diff"] == pytest.approx(good["exported"]["parts"][name]["max_abs_diff"], abs=1e-5)


def test_it_needs_no_training_packages(device: Path) -> None:
    done = run_without(TRAINING, "check", device, "--threads", 1)
    assert done.returncode == 0, done.stderr
