"""`dmpt-export inspect`: parts, tensors, operators, and path usage on a text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from quant.checkpoint import save_quantized
from tests.helpers.tolerances import TOLERANCE
from training.model.shape import even_allocation


@pytest.fixture(scope="module")
def folders(
    tiny_dmpt: Path, tiny_quad: Path, make_dmpt: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("inspect")
    make_dmpt(out / "checkpoint-8", splits=[2], head_allocation=even_allocation(["left", "right"], 8), fast_k=16)
    save_quantized(tiny_dmpt, out / "quantized", scheme="int8")
    save_quantized(out / "checkpoint-8", out / "quantized-8", scheme="int8")
    sources = {
        "onnx": tiny_dmpt, "onnx-int8": out / "quantized", "onnx-quad": tiny_quad,
        "onnx-8": out / "checkpoint-8", "onnx-8-int8": out / "quantized-8",
    }  # fmt: skip
    for name, source in sources.items():
        export_onnx(source, out / name, verify=False)
    export_onnx(tiny_dmpt, out / "onnx-cache", ExportOptions(kv_cache="int8"), verify=False)
    return {"checkpoint": str(tiny_dmpt), **{path.name: str(path) for path in out.iterdir()}}


@pytest.fixture
def text(sample_text: str, tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(sample_text, encoding="utf-8")
    return str(path)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["checkpoint", "quantized", "onnx", "onnx-int8", "onnx-quad", "onnx-8", "onnx-8-int8", "onnx-cache"]
)
def test_tensors_add_up_to_the_parts(name: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, folders[name])
    assert sum(tensor["bytes"] for tensor in found["tensors"].values()) == found["bytes"]
    assert found["kind"] == name.split("-")[0]
    assert ("operators" in found) == (found["kind"] == "onnx")


@pytest.mark.parametrize("name", ["checkpoint", "onnx"])
def test_no_part_is_named_as_if_it_held_another(
    name: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """ "transformer" beside "transformer.wte" would read as their sum."""
    parts = inspect(capsys, folders[name])["parts"]
    assert {"transformer.wte", "transformer.wpe", "transformer.h", "paths.left", "heads.1"} <= set(parts)
    assert not [(a, b) for a in parts for b in parts if b.startswith(f"{a}.")]


def test_an_export_stores_what_its_checkpoint_does(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {
        "onnx": "checkpoint", "onnx-cache": "checkpoint", "onnx-8": "checkpoint-8", "onnx-8-int8": "quantized-8",
        "onnx-int8": "quantized",
    }  # fmt: skip
    for onnx, checkpoint in pairs.items():
        expected, found = (inspect(capsys, folders[name])["tensors"] for name in (checkpoint, onnx))
        assert found == expected, onnx
    assert found["paths.left.h.2.mlp.c_fc.weight"] == {"scheme": "int8", "bits": 8, "block": 32, "bytes": 4608}
    assert found["gates.root.0.weight"]["scheme"] == "float32"


def test_operators_are_counted_in_the_main_graph_and_its_branches(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspect(capsys, folders["onnx-int8"])["operators"]
    assert found["main"]["GroupQueryAttention"] == 2
    assert found["branches"]["GroupQueryAttention"] == 4
    assert found["main"]["If"] == 2 + 1
    assert found["branches"]["If"] == 2  # guards around TopK, one for each path
    assert found["branches"]["MatMulNBits"] == 2 * (2 * 4 + 1)  # two paths of two blocks and an anchor
    assert inspect(capsys, folders["onnx-quad"])["operators"]["main"]["If"] == 6 + 1  # paths, and the order of rows


def test_route_shares_are_those_of_the_model(
    folders: dict[str, str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, onnx = (inspect(capsys, folders[name], "--data", text)["usage"] for name in ("checkpoint", "onnx"))
    assert 0.02 < onnx["route_shares"]["left"] < 0.98
    assert sum(onnx["route_shares"].values()) == pytest.approx(1)
    heads, exported = checkpoint.pop("head_shares"), onnx.pop("head_shares")
    assert checkpoint == onnx
    assert exported.keys() == heads.keys()
    assert all(exported[leaf] == pytest.approx(heads[leaf], abs=TOLERANCE["float32", "float"]) for leaf in heads)
    assert set(heads) == {"left", "right"}
    assert set(heads["left"]) == {"0", "1"}
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-5) for shares in heads.values())


def test_usage_against_a_slow_reference(tiny_quad: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from benchmarks.quality.open_scorer import open_scorer
    from benchmarks.quality.perplexity import read_tokens
    from training.checkpoints.checkpoint import load_model

    found = inspect(capsys, str(tiny_quad), "--data", text)["usage"]
    ids = read_tokens(open_scorer(tiny_quad), [text])
    model = load_model(tiny_quad)
    paths: list[list[str]] = []
    weights: dict[str, list[np.ndarray]] = {leaf: [] for leaf in model.config.leaves}
    with torch.no_grad():
        for start in range(0, len(ids), 64):
            hidden = model.hidden(torch.as_tensor(ids[start : start + 64].astype(np.int64))[None])
            routes = model.routes(hidden.gates)[0].tolist()
            paths.append([model.config.leaves[i] for i in routes])
            for t, leaf in enumerate(paths[-1]):
                weights[leaf].append(model.head_log_weights(leaf, hidden.leaves[leaf][0, t]).exp().numpy())
    names = [leaf for piece in paths for leaf in piece]
    ends = open_scorer(tiny_quad).end_of_text  # begins the next text
    changes = [
        a != b
        for start, piece in zip(range(0, len(ids), 64), paths, strict=True)
        for a, b, token in zip(piece, piece[1:], ids[start + 1 :], strict=False)
        if token != ends
    ]
    assert len(changes) < len(ids) - len(paths), "the text has ends inside its windows"
    assert found["tokens"] == len(ids)
    assert found["switch_share"] == pytest.approx(np.mean(changes))
    for leaf, rows in weights.items():
        assert found["route_shares"][leaf] == pytest.approx(names.count(leaf) / len(ids))
        expected = np.mean(rows, axis=0) if rows else np.zeros(len(model.config.head_allocation[leaf]))
        assert list(found["head_shares"][leaf].values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_people_see_it_too(folders: dict[str, str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders["onnx-int8"], "--data", text, "--all"]) == 0
    shown = capsys.readouterr().out
    for words in ("MatMulNBits", "branches", "int8:32", ".h.*.mlp.c_fc.weight", "% of tokens", "a different path"):
        assert words in shown
    assert main(["inspect", folders["checkpoint"], "--data", text]) == 0
    assert "heads 0: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint-8", "onnx-8-int8", "onnx-quad"])
def test_without_all_it_fits_on_a_screen(
    name: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", folders[name]]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 40
    assert ".h.*" not in shown
    assert main(["inspect", folders[name], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored = shown.split("stored as")[1].split("\n\n")[0].splitlines()[1:]
    assert sum(int(line.split()[1].replace(",", "")) for line in stored) == len(found["tensors"])
    assert {line.split()[0].split(":")[0] for line in stored} == {t["scheme"] for t in found["tensors"].values()}


def test_without_onnx_and_torch_the_rest_is_shown(folders: dict[str, str], text: str) -> None:
    code = (
        "import sys, importlib.util\n"
        "blocked = ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors', 'accelerate')\n"
        "for name in blocked:\n"
        "    sys.modules[name] = None\n"
        "import dmpt_export.inspect.summary as summary\n"
        "summary.find_spec = lambda name: None\n"
        "from dmpt_export.cli.main import main\n"
        f"sys.exit(main(['inspect', {folders['onnx-int8']!r}, '--data', {text!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install onnx" in done.stdout
    assert "% of tokens" in done.stdout


def test_bad_input_is_one_line_and_code_3(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(folders["onnx"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.onnx").write_bytes(b"\xff" * 100)
    for arguments, said in (
        ([str(broken)], "is not an ONNX model"),
        ([folders["onnx"], "--data", str(tmp_path / "gone.txt")], "gone.txt"),
        ([folders["onnx"], "--data", ""], "data file"),
        ([str(tmp_path / "gone")], "gone"),
    ):
        assert main(["inspect", *arguments]) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert said in err
        assert err.count("\n") == 1
