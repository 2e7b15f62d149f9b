"""Nothing reports: neither ONNX Runtime on a device, nor other libraries in the commands' processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed.processes import Worker, WorkerFailed
from runtime.ort import ORT, SWITCHES, import_onnxruntime, no_telemetry
from tests.helpers.paths import REPOSITORY

# ONNX Runtime 1.32 writes its files on import, and first looks for its collector nine seconds after that.
SECONDS = 12
RUNS = """
import sys, time
from dmpt_export.cli.main import main
end = time.monotonic() + float(sys.argv[2])
while True:
    code = main(["run", sys.argv[1], "The tide mill", "-n", "4"])
    if code or time.monotonic() > end:
        sys.exit(code)
"""
SOCKETS = "socket,connect,sendto,sendmsg,bind"
TRACE = shutil.which("strace")


def left_by(place: Path, code: str, *arguments: object, trace: Path | None = None, **variables: str) -> list[str]:
    """The files that a Python process leaves where its home, temporary and working folders were empty."""
    home, tmp = place / "home", place / "tmp"
    for folder in (home, tmp):
        folder.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if trace is not None:
        command = [str(TRACE), "-f", "-qq", "-o", str(trace), "-e", f"trace={SOCKETS}", "-e", "signal=none", *command]
    env = {**kept, **own, "HOME": str(home), "TMPDIR": str(tmp), **variables}
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file())


def calls(trace: Path) -> list[str]:
    return re.findall(rf"\b(?:{SOCKETS.replace(',', '|')})\(.*", trace.read_text(encoding="utf-8", errors="replace"))


def can_trace(out: Path) -> bool:
    """Whether strace is installed and may trace here, and sees a socket."""
    if not TRACE:
        return False
    code = "import socket; socket.socket().close()"
    done = subprocess.run([TRACE, "-f", "-o", out, "-e", f"trace={SOCKETS}", sys.executable, "-c", code], check=False)
    return done.returncode == 0 and bool(calls(out))


def test_run_leaves_no_file_and_opens_no_socket(dual_device: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    trace = tmp_path / "trace" if can_trace(tmp_path / "probe") else None
    assert left_by(place, RUNS, dual_device, SECONDS, trace=trace) == []
    if trace is not None:
        assert calls(trace) == []


def test_a_person_may_allow_it(dual_device: Path, tmp_path: Path) -> None:
    """It also shows that the test above would see the files."""
    version = tuple(map(int, import_onnxruntime().__version__.split(".")[:2]))
    if sys.platform != "linux" or version < (1, 29):
        pytest.skip("this package of onnxruntime has no uploader")
    assert any("onnxruntime" in name for name in left_by(tmp_path, RUNS, dual_device, 0, **{ORT: "0"}))


def test_the_import_alone_leaves_nothing(tmp_path: Path) -> None:
    assert left_by(tmp_path, "from runtime.ort import import_onnxruntime\nimport_onnxruntime()") == []


@pytest.mark.parametrize("name", SWITCHES)
def test_only_permission_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    off, allowed = SWITCHES[name]
    for before, after in ((None, off), ("", off), (off, off), ("off", off), ("no", off), (allowed, allowed)):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        no_telemetry()
        assert os.environ[name] == after, before


def test_events_of_an_engine_that_is_already_there_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    monkeypatch.setattr(import_onnxruntime(), "disable_telemetry_events", lambda: stopped.append(True))
    monkeypatch.setenv(ORT, "0")
    import_onnxruntime()
    assert stopped == []
    monkeypatch.delenv(ORT)
    import_onnxruntime()
    assert stopped == [True]


def test_peers_processes_report_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter, whatever it imports, finds the switches set; permission passes through."""
    names = sorted(SWITCHES)
    (tmp_path / "tattler.py").write_text(
        f"import os\ndef load(*_):\n    raise ValueError([os.environ.get(name) for name in {names}])\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    for permitted in (None, ORT):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if permitted:
            monkeypatch.setenv(permitted, SWITCHES[permitted][1])
        worker = Worker("tattler")
        with pytest.raises(WorkerFailed, match="ValueError") as caught:
            worker.ask(do="load", adapter="tattler", path="", threads=1, device="cpu")
        worker.close()
        assert str([SWITCHES[name][name == permitted] for name in names]) in str(caught.value)
