"""Downloads of the JavaScript runtime that are kept in the browser, and go on where they were cut off.

Runs in Node, with a stand-in for the browser's storage; tests/runtime/test_web_browser.py has the real one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.paths import REPOSITORY
from tests.helpers.static_server import StaticServer

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="Node is not installed")
PIECE = 4 << 20
SIZE = 2 * PIECE + 12345
DATA = "model.onnx.data"
PATH = f"/model/{DATA}"
ANY: dict[str, Any] = {}


def publish(folder: Path, seed: int) -> str:
    """A folder whose data file has two pieces and a bit; the sha256 of the file."""
    data = np.random.default_rng(seed).bytes(SIZE)
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / DATA).write_bytes(data)
    files = {DATA: {"size": SIZE, "sha256": sha256}}
    (folder / "model" / "dmpt_manifest.json").write_text(json.dumps({"files": files}))
    return sha256


@pytest.fixture(params=[True, False], ids=["ranges", "whole files"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StaticServer]:
    with StaticServer(tmp_path, ranges=request.param) as server:
        yield server


def visit(server: StaticServer, *visits: dict[str, Any]) -> list[dict[str, Any]]:
    request = server.folder / "request.json"
    request.write_text(
        json.dumps(
            {
                "web": str(REPOSITORY / "runtime" / "web"),
                "address": f"{server.address}/model",
                "visits": [{"file": DATA, "store": ANY} | each for each in visits],
            }
        )
    )
    probe = REPOSITORY / "tests" / "helpers" / "kept_probe.mjs"
    done = subprocess.run([str(NODE), str(probe), str(request)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_a_download_goes_on_where_it_was_cut_off(server: StaticServer, tmp_path: Path) -> None:
    sha256 = publish(tmp_path, 1)
    server.cut[PATH] = PIECE + 1000
    cut, resumed, kept = visit(server, ANY, ANY, ANY)
    assert cut["error"].startswith(f"the download of {DATA} was cut off after {PIECE + 1000} of {SIZE} bytes")
    assert cut["entries"] == 1
    assert resumed["sha256"] == sha256
    assert resumed["first"] == PIECE, "the kept piece counts at once"
    assert resumed["last"] == SIZE
    assert kept["sha256"] == sha256
    assert server.asked(PATH) == [None, f"bytes={PIECE}-"], "the third visit reads what is kept"
    assert kept["entries"] == 3


def test_without_room_or_storage_the_download_goes_on_unkept(server: StaticServer, tmp_path: Path) -> None:
    sha256 = publish(tmp_path, 2)
    stores: list[dict[str, Any]] = [{"refused": True}, {"hidden": True}, {"room": PIECE + 10}]
    for store, entries in zip(stores, (0, 0, 1), strict=True):
        [answer] = visit(server, {"store": store})
        assert answer["sha256"] == sha256, store
        assert answer["entries"] == entries
    assert server.asked(PATH) == [None] * 3
    first, second = visit(server, {"store": stores[2]}, {"store": stores[2]})
    assert first["sha256"] == second["sha256"] == sha256
    assert server.asked(PATH) == [None, f"bytes={PIECE}-"], "what had room is not loaded twice"


def test_pieces_of_another_model_are_cleared(server: StaticServer, tmp_path: Path) -> None:
    """The server's model changes between a cut and the next visit: no piece of the old file is used."""
    publish(tmp_path, 3)
    (tmp_path / "next").mkdir()
    sha256 = publish(tmp_path / "next", 4)
    server.cut[PATH] = PIECE + 1000
    cut, answer = visit(server, ANY, {"publish": [str(tmp_path / "next"), str(tmp_path)]})
    assert "error" in cut
    assert cut["entries"] == 1
    assert answer["sha256"] == sha256
    assert answer["entries"] == 3
    assert server.asked(PATH) == [None, None]


def test_a_damaged_piece_shows_and_can_be_forgotten(server: StaticServer, tmp_path: Path) -> None:
    sha256 = publish(tmp_path, 5)
    good, damaged, again = visit(server, ANY, {"damage": True, "forget": True}, ANY)
    assert good["sha256"] == again["sha256"] == sha256
    assert damaged["sha256"] != sha256
    assert damaged["entries"] == 0
    assert server.asked(PATH) == [None, None]


def test_a_range_that_begins_elsewhere_is_not_used(tmp_path: Path) -> None:
    sha256 = publish(tmp_path, 6)
    with StaticServer(tmp_path) as server:
        server.cut[PATH] = PIECE + 1000
        server.shift = 7
        cut, answer = visit(server, ANY, ANY)
        assert "error" in cut
        assert answer["sha256"] == sha256
        assert server.asked(PATH) == [None, f"bytes={PIECE}-", None]
        server.cut[PATH] = PIECE + 1000
        server.shift = SIZE  # refused: 416
        cut, answer = visit(server, ANY, ANY)
        assert answer["sha256"] == sha256


def test_a_file_longer_than_its_manifest_is_refused(server: StaticServer, tmp_path: Path) -> None:
    publish(tmp_path, 7)
    with (tmp_path / "model" / DATA).open("ab") as file:
        file.write(b"more")
    [answer] = visit(server, ANY)
    assert f"{DATA} is longer than {SIZE} bytes" in answer["error"]
