"""What killed runs and full disks leave behind is gone after the next run, and runs that end well leave nothing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dmpt_export.demo.folder import publish as publish_comparison
from dmpt_export.requests.onnx import ExportRequest
from tests.helpers.models import random_model
from tests.helpers.training_runs import TOKENS, options
from training.checkpoints.atomic import locked, scratch_folder, sweep
from training.checkpoints.places import check_replaceable
from training.loop import state
from training.loop.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
# What a kill may leave in a run's folder: its parts are written by atomic_folder, its files by atomic_file.
LEFT = [
    ".last.tmp-0123abcd/model.safetensors", ".best.tmp-0123abcd/model.safetensors", ".config.json.tmp-0123abcd",
    "best/.config.json.tmp-0123abcd", ".model.safetensors.tmp", ".lock",
]  # fmt: skip


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def leave(folder: Path) -> None:
    for name in LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("part")


def trained(out: Path, **more: Any) -> None:
    train(random_model([], 1), TOKENS, options(max_steps=1, eval_every=1), out, TOKENS[:50], **more)


def test_a_run_that_is_resumed_when_it_is_finished_stays_the_same(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    before = names(tmp_path)
    trained(tmp_path / "run", resume=True)
    assert names(tmp_path) == before
    leave(tmp_path / "run")
    trained(tmp_path / "run", resume=True)
    assert names(tmp_path) == before
    leave(tmp_path / "run")
    trained(tmp_path / "run", overwrite=True)
    assert names(tmp_path) == before


def test_a_run_that_was_killed_before_it_saved_anything_can_begin_again(tmp_path: Path) -> None:
    leave(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    trained(tmp_path / "run")
    assert not [name for name in names(tmp_path) if "tmp" in name or "lock" in name]


def test_what_a_running_process_writes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    for name in (".last.tmp-0123abcd", ".other.tmp-0123abcd", ".notes.tmp", ".x.tmp-012", "a.tmp-0123abcd", ".b.new-9"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / ".last.tmp-0123abcd"):
        sweep(tmp_path)
        assert names(tmp_path) == {".last.tmp-0123abcd", ".notes.tmp", ".x.tmp-012", "a.tmp-0123abcd", ".b.new-9"}


@pytest.mark.parametrize("linking", [True, False])
def test_a_full_disk_leaves_no_part_of_a_published_model(
    linking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_text("weights")

    def full(source: Path, target: Path) -> None:
        Path(target).write_text("wei")
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if linking:
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(os, "link", no_links)
        monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        state.publish(tmp_path / "best", tmp_path)
    assert {name for name in names(tmp_path) if "tmp" in name} == set()


def test_a_model_folder_with_such_parts_may_be_replaced(tiny_dmpt: Path, tmp_path: Path) -> None:
    """`card` or a kill while publishing leaves them in a folder that is otherwise complete."""
    shutil.copytree(tiny_dmpt, tmp_path / "model")
    (tmp_path / "model" / ".README.md.tmp-0123abcd").write_text("part")
    check_replaceable(tmp_path / "model", "checkpoint")


def test_scratch_folders_of_killed_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.new-0123abcd" / "quantized").mkdir(parents=True)
    with scratch_folder(tmp_path / "out") as folder:
        assert names(tmp_path) == {folder.name}
        with scratch_folder(tmp_path / "out") as other:  # another run's, at the same time
            assert names(tmp_path) == {folder.name, other.name}
    assert not names(tmp_path)
    (tmp_path / ".comparison.new-0123abcd").mkdir()
    publish_comparison(lambda folder: (folder / "report.html").write_text("x") and None, tmp_path)
    assert names(tmp_path) == {"report.html"}


def test_an_export_that_quantizes_leaves_nothing_beside_it(tiny_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / ".device.new-0123abcd" / "quantized").mkdir(parents=True)
    (tmp_path / ".device.tmp-0123abcd").mkdir()
    (tmp_path / ".device.lock").touch()
    request = ExportRequest(str(tiny_gpt2), str(tmp_path / "device"), scheme="int8", no_verify=True)
    request.run(request.check())
    assert [path.name for path in tmp_path.iterdir()] == ["device"]
