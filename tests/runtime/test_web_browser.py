"""The page that `dmpt-export page` writes, in a headless Chromium: it writes what the Python runtime writes.

Needs Chromium, Node, and `npm ci --ignore-scripts` in runtime/web; skipped with a reason where one is missing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime
from dmpt_export.onnx.export import export_onnx
from dmpt_export.requests.page import PageRequest
from tests.helpers.paths import REPOSITORY
from tests.helpers.static_server import StaticServer

MODULES = REPOSITORY / "runtime" / "web" / "node_modules"
NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = (
    "Node is not installed"
    if NODE is None
    else "no Chromium: install chromium or google-chrome"
    if CHROMIUM is None
    else ""
    if (MODULES / "onnxruntime-web").is_dir()
    else "no node_modules: run `npm ci --ignore-scripts` in runtime/web"
)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
READY = "!document.getElementById('write').disabled"
STATUS = "document.getElementById('status').textContent"
DATA = "/model/model.onnx.data"
PROMPT = "The tide mill is"
Visit = Callable[..., list[list[Any]]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, make_dmpt: Callable[..., Any]) -> Path:
    """A page whose data file has more than one piece."""
    place = tmp_path_factory.mktemp("browser")
    heads = {"left": [0, 1], "right": [2, 3]}
    make_dmpt(place / "checkpoint", n_embd=192, splits=[2], head_allocation=heads, fast_k=16)
    export_onnx(place / "checkpoint", place / "device", verify=False)
    request = PageRequest(str(place / "device"), str(place / "site"), str(MODULES))
    request.run(request.check())
    assert (place / "site" / DATA[1:]).stat().st_size > 5 << 20
    return place / "site"


@pytest.fixture
def visit(tmp_path: Path) -> Visit:
    """visit({address, steps}, ...): what each visit took. All visits of a test share a browser's profile."""

    def run(*visits: dict[str, Any]) -> list[list[Any]]:
        request = tmp_path / "request.json"
        request.write_text(
            json.dumps({"chromium": CHROMIUM, "profile": str(tmp_path / "profile"), "visits": visits, "seconds": 40})
        )
        script = REPOSITORY / "tests" / "helpers" / "browser.mjs"
        line = [str(NODE), "--no-warnings", "--experimental-websocket", str(script), str(request)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        answers: list[list[Any]] = json.loads(done.stdout)
        return answers

    return run


@pytest.fixture
def server(site: Path) -> Iterator[StaticServer]:
    with StaticServer(site) as server:
        yield server


def written(**values: Any) -> list[dict[str, str]]:
    """Steps that write with these fields of the page and take the text's pieces."""
    fields = "".join(
        f"document.getElementById({json.dumps(name)}).value = {json.dumps(str(value))};"
        for name, value in values.items()
    )
    return [
        {"until": READY},
        {"take": f"{fields} document.getElementById('form').requestSubmit(), 0"},
        {"until": f"{STATUS}.startsWith('Ended') || document.querySelector('.error')"},
        {"take": STATUS},
        {"take": "[...document.querySelectorAll('#text span')].map(piece => [piece.textContent, piece.title])"},
    ]


def test_the_page_writes_what_python_writes(site: Path, server: StaticServer, visit: Visit) -> None:
    options = {"prompt": PROMPT, "tokens": 40, "temperature": 0.7, "top-k": 20, "seed": 5}
    [[_, status, pieces]] = visit({"address": f"{server.address}/", "steps": written(**options)})
    with runtime.load(site / "model", threads=1) as model:
        made = model.stream(PROMPT, max_new_tokens=40, temperature=0.7, top_k=20, seed=5)
        tokens = list(made)
    assert len({token.path for token in tokens}) > 1, "no switches"
    assert status == f"Ended: {str(made.stop_reason).replace('_', ' ')}."
    assert [text for text, _ in pieces] == [token.text for token in tokens]
    assert [title.splitlines()[0] for _, title in pieces] == [f"path {token.path}" for token in tokens]
    assert all("head " in title for _, title in pieces)


def test_a_second_visit_loads_no_file_of_the_model_again(server: StaticServer, visit: Visit) -> None:
    place = {"address": f"{server.address}/", "steps": [{"until": READY}]}
    visit(place)
    first = {path for path, _ in server.requests if path.startswith("/model/")}
    assert {DATA, "/model/model.onnx", "/model/tokenizer.json"} <= first
    server.requests.clear()
    visit(place)  # in a fresh browser with the same profile
    assert {path for path, _ in server.requests if path.startswith("/model/")} <= {"/model/dmpt_manifest.json"}


def test_a_closed_tab_continues_its_download(server: StaticServer, visit: Visit) -> None:
    server.cut[DATA] = (4 << 20) + 5000
    failed = {
        "address": f"{server.address}/",
        "steps": [{"until": "document.querySelector('.error')"}, {"take": STATUS}],
    }
    [[message]] = visit(failed)
    assert message.startswith("The model cannot be loaded: the download of")
    assert re.search(r"model\.onnx\.data was cut off after 419\d{4} of", message)
    visit({"address": f"{server.address}/", "steps": [{"until": READY}]})
    assert server.asked(DATA) == [None, f"bytes={4 << 20}-"]


def test_damaged_files_are_named_and_loaded_again(site: Path, tmp_path: Path, visit: Visit) -> None:
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    whole = (copy / DATA[1:]).read_bytes()
    (copy / DATA[1:]).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with StaticServer(copy) as server:
        place = {"address": f"{server.address}/"}
        [[message]] = visit(place | {"steps": [{"until": "document.querySelector('.error')"}, {"take": STATUS}]})
        assert "model.onnx.data has a different sha256" in message
        (copy / DATA[1:]).write_bytes(whole)
        visit(place | {"steps": [{"until": READY}]})
        assert server.asked(DATA) == [None, None]


def test_a_new_model_on_the_server_is_seen(
    site: Path, make_gpt2: Callable[..., Any], tmp_path: Path, visit: Visit
) -> None:
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    make_gpt2(tmp_path / "other")
    export_onnx(tmp_path / "other", tmp_path / "next", verify=False)
    ready = [{"until": READY}, {"take": "document.getElementById('name').textContent"}]
    with StaticServer(copy) as server:
        place = {"address": f"{server.address}/", "steps": ready}
        [[before]] = visit(place)
        shutil.rmtree(copy / "model")
        shutil.copytree(tmp_path / "next", copy / "model")
        [[after]] = visit(place)
    assert (before, after) == ("checkpoint", "other")


def test_a_page_opened_from_a_disk_says_what_to_do(site: Path, visit: Visit) -> None:
    [[message]] = visit({"address": (site / "index.html").as_uri(), "steps": [{"take": STATUS}]})
    assert "python -m http.server" in message


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("delete globalThis.WebAssembly", "WebAssembly:"),
        ("WebAssembly.validate = () => false", "WebAssembly SIMD:"),
        ("delete globalThis.BigInt64Array", "BigInt64Array:"),
        ("delete Response.prototype.body", "Response.body"),
    ],
)
def test_a_missing_feature_is_named(change: str, name: str, server: StaticServer, visit: Visit) -> None:
    failed = [{"until": "document.querySelector('.error')"}, {"take": STATUS}]
    [[message]] = visit({"address": f"{server.address}/", "before": change, "steps": failed})
    assert name in message
    assert "current version of Firefox" in message
    assert not server.asked(DATA)


@pytest.mark.parametrize(
    "change",
    [
        "delete globalThis.FinalizationRegistry",  # the heap's caches cannot be used
        "Object.defineProperty(globalThis, 'caches', { get() { throw new DOMException('no', 'SecurityError') } })",
        "Cache.prototype.put = async () => { throw new DOMException('no', 'QuotaExceededError') }",
    ],
)
def test_the_page_writes_without_what_it_can_do_without(change: str, server: StaticServer, visit: Visit) -> None:
    options = {"prompt": PROMPT, "tokens": 5, "temperature": 0}
    place = {"address": f"{server.address}/", "steps": written(**options)}
    [[_, usual, pieces]] = visit(place)
    [[_, status, same]] = visit(place | {"before": change})
    assert (status, same) == (usual, pieces)
    assert len(pieces) == 5
