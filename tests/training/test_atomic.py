"""A kill or failure at any moment leaves either the old folder or the new one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kills import STEPS
from training.checkpoints import atomic
from training.checkpoints.atomic import atomic_file, atomic_folder, recover
from training.checkpoints.places import check_place, check_replaceable
from training.errors import InputError


def product(folder: Path, version: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "dmpt", "version": version}))
    (folder / "model.safetensors").write_text(version * 1000)


def write(out: Path, version: str) -> None:
    with atomic_folder(out, "checkpoint") as tmp:
        product(tmp, version)


def version_of(out: Path) -> str | None:
    """None when absent; fails when the folder is neither the old nor the new one."""
    if not out.exists():
        return None
    version = str(json.loads((out / "config.json").read_text())["version"])
    assert (out / "model.safetensors").read_text() == version * 1000
    assert len(list(out.iterdir())) == 2
    return version


def write_and_fail(out: Path, error: type[BaseException]) -> None:
    with atomic_folder(out, "checkpoint") as tmp:
        product(tmp, "two")
        raise error("planted")


@pytest.fixture(params=["exchange", "two renames"])
def swap(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Both ways to replace a folder, wherever the tests run."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    elif not atomic._exchange(tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")):
        pytest.skip("this file system cannot exchange two folders")
    return str(request.param)


def test_new_folder_and_replacement(swap: str, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "model [1]"
    for version in ("one", "two", "three"):
        write(out, version)
        assert version_of(out) == version
        assert os.listdir(out.parent) == ["model [1]"]


def test_modes_are_those_of_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out", "checkpoint") as tmp:
            product(tmp, "one")
            (tmp / "trainer_state").mkdir()
            (tmp / "trainer_state" / "private").touch(mode=0o600)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert modes == {"out": 0o750, "config.json": 0o640, "model.safetensors": 0o640, "trainer_state": 0o750,
                     "private": 0o640}  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_failure_while_writing_leaves_everything_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    fresh, old = tmp_path / "deep" / "new", tmp_path / "old"
    write(old, "one")
    for out in (fresh, old):
        with pytest.raises(error, match="planted"):
            write_and_fail(out, error)
    assert os.listdir(tmp_path) == ["old"]
    assert version_of(old) == "one"


@pytest.mark.parametrize("step", ["rename", "replace", "fsync"])
def test_failure_while_publishing_keeps_the_old(
    step: str, swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, "one")
    real, calls = getattr(os, step), []

    def fail(*args: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise OSError("planted")
        return real(*args)

    monkeypatch.setattr(os, step, fail)
    if swap == "exchange" and step != "fsync":
        write(out, "two")  # neither call is needed
        assert not calls
        assert version_of(out) == "two"
        return
    with pytest.raises(OSError, match="planted"):
        write(out, "two")
    assert version_of(out) == "one"
    assert os.listdir(tmp_path) == ["out"]


KILLED = (
    """
import os, shutil, signal, sys
from pathlib import Path
from training.checkpoints import atomic

out, last, two_renames = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "two renames"
"""
    + STEPS
    + """for name in ("mkdir", "rename", "replace", "fsync"):
    setattr(os, name, step(getattr(os, name)))
atomic._exchange = (lambda a, b: False) if two_renames else step(atomic._exchange)
with atomic.atomic_folder(out, "checkpoint") as tmp:
    step(tmp.joinpath("config.json").write_text)('{"model_type": "dmpt", "version": "two"}')
    step(tmp.joinpath("model.safetensors").write_text)("two" * 1000)
"""
)


def test_kill_at_every_step(swap: str, tmp_path: Path) -> None:
    """The writer is killed before and after each disk operation, with and without an old folder."""
    seen = set()
    for existing in (None, "one"):
        for last in range(60):
            out = tmp_path / f"{existing}{last}" / "out"
            out.parent.mkdir()
            if existing:
                write(out, existing)
            done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(last), swap], check=False)
            found = version_of(out)
            seen.add((existing, found))
            if swap == "exchange":
                assert found in (existing, "two")  # at every moment one of the two is there
            recover(out)
            assert version_of(out) in (existing, "two")
            assert set(os.listdir(out.parent)) <= {"out"}
            write(out, "three")
            assert version_of(out) == "three"
            assert os.listdir(out.parent) == ["out"]
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL
        else:
            pytest.fail("the writer never came to its end")
    assert {(None, None), (None, "two"), ("one", "one"), ("one", "two")} <= seen


def test_running_writer_is_not_disturbed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out, "checkpoint") as first:
        product(first, "first")
        write(out, "second")  # cleans up after killed runs: not after this one
        assert first.is_dir()
        assert version_of(out) == "second"
    assert version_of(out) == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    names = {".out.tmp", ".output.tmp-12", "out.tmp-12", ".xout.tmp-1"}
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.tmp-left").mkdir()
    write(tmp_path / "out", "one")
    assert set(os.listdir(tmp_path)) == names | {"out"}


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert version_of(tmp_path / "real") == "two"


# --- what may be replaced ---------------------------------------------------------------------------

PRODUCTS = {
    "checkpoint": {"config.json": '{"model_type": "dmpt"}'},
    "quantized": {"config.json": '{"model_type": "dmpt", "quantization": {}}'},
    "onnx": {"dmpt_manifest.json": "{}"},
    "comparison": {"comparison.json": "{}"},
}
FOREIGN = {
    "gpt2": {"config.json": '{"model_type": "gpt2"}'},
    "notes": {"notes.txt": ""},
    "broken": {"config.json": "{"},
}


def test_a_place_is_judged_by_itself_where_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a volume mounted in a folder that is not writable."""
    inside = tmp_path / "kept" / "mine"
    inside.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) == inside)
    check_place(inside)
    for place in (tmp_path / "kept" / "new", tmp_path / "kept"):
        with pytest.raises(InputError, match="is not writable"):
            check_place(place)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_only_products_of_the_same_kind_are_replaced(kind: str, tmp_path: Path) -> None:
    for name, content in (PRODUCTS | FOREIGN).items():
        out = tmp_path / name
        out.mkdir()
        check_replaceable(out, kind)  # empty
        for file, text in content.items():
            (out / file).write_text(text)
        if name == kind:
            check_replaceable(out, kind)
            continue
        with pytest.raises(InputError, match="is not empty and is not a dmpt-export"), atomic_folder(out, kind):
            pytest.fail("must be refused before any work")
        assert {path.name for path in out.iterdir()} == set(content)


@pytest.mark.parametrize("name", ["notes.txt", ".git/", "data/", "train.py"])
def test_somebodys_work_inside_a_product_is_not_deleted(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one")
    path = out / name
    path.mkdir() if name.endswith("/") else path.touch()
    with pytest.raises(InputError, match=path.name.replace(".", r"\.")):
        write(out, "two")
    assert path.exists()


def test_own_extras_inside_a_product_may_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one")
    (out / "trainer_state").mkdir()
    (out / "metrics.jsonl").touch()
    write(out, "two")
    assert version_of(out) == "two"


def test_file_in_the_way_and_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        write(tmp_path / "file", "one")
    with pytest.raises(InputError, match="is a file: give another place"):
        write(tmp_path / "file" / "below", "one")
    with pytest.raises(ValueError, match="KINDS"):
        check_replaceable(tmp_path, "something")


# --- single files -----------------------------------------------------------------------------------


def test_atomic_file(tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.json"
    with pytest.raises(RuntimeError, match="planted"), atomic_file(out) as tmp:
        raise RuntimeError("planted")
    assert os.listdir(tmp_path) == []
    for text in ("one", "two"):
        with atomic_file(out) as tmp:
            tmp.write_text(text)
        assert out.read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_file(out) as tmp:
        raise KeyboardInterrupt
    (out.parent / ".plan.json.tmp-left").touch()
    assert out.read_text() == "two"
    with atomic_file(out) as tmp:
        tmp.write_text("four")
    assert os.listdir(out.parent) == ["plan.json"]
