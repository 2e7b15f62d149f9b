"""No file that a model folder only links to, or that is not what its name says, gets into what is made of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import save_quantized
from runtime.manifest_file import REPORT_NAME
from tests.helpers.checkpoints import one_line
from tests.helpers.cli import run
from training.checkpoints.files import MODEL_FILES, TOKENIZER_FILES, resolve
from training.errors import InputError
from training.text.tokenizer import load_tokenizer

SECRET = "hunter2-correct-horse"
NAMES = [*TOKENIZER_FILES, *(name.replace("*", "") for name in MODEL_FILES), "README.md", REPORT_NAME]
VERBS = {
    "init": ["init", "{model}", "{out}", "--splits", "2"],
    "train": ["train", "{model}", "{out}", "--data", "{text}", "--max-steps", "1"],
    "train, tokenizer": ["train", "--from-scratch", "{out}", "--tokenizer", "{model}", "--data", "{text}"],
    "quantize": ["quantize", "{model}", "{out}", "--scheme", "int8"],
    "onnx": ["onnx", "{model}", "{out}", "--no-verify"],
    "onnx, one path": ["onnx", "{model}", "{out}", "--no-verify", "--only-path", "root"],
    "onnx, quantized": ["onnx", "{model}", "{out}", "--no-verify", "--scheme", "int8"],
    "convert, heads": ["convert", "{model}", "{out}", "--heads", "projected", "--calib", "{text}"],
    "eval": ["eval", "{model}", "--data", "{text}"],
    "compare": ["compare", "{model}", "--data", "{text}", "--out", "{out}"],
    "inspect": ["inspect", "{model}"],
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside the model folder that is also good JSON."""
    path = tmp_path / "private" / "key.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"password": SECRET}))
    return path


@pytest.fixture
def model(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A downloaded folder, to plant links in."""
    return Path(shutil.copytree(tiny_gpt2, tmp_path / "model"))


def plant(link: Callable[[Path, Path], object], target: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    link(target, path)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_folder_is_not_followed(name: str, model: Path, secret: Path) -> None:
    plant(os.symlink, secret, model / name)
    with one_line("outside its folder, which is not followed.*cp -RL", str(model / name)):
        resolve(model)
    plant(os.symlink, Path("..", "private", "key.json"), model / name)
    with one_line("outside its folder", "../private/key.json"):
        resolve(model)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_such_a_folder(
    verb: str, model: Path, secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words\n" * 300)
    places = {"model": model, "out": tmp_path / "out", "text": tmp_path / "text.txt"}
    for name in ("tokenizer.json", "README.md", REPORT_NAME):
        kept = (model / name).read_bytes() if (model / name).is_file() else None
        plant(os.symlink, secret, model / name)
        assert run(*(part.format(**places) for part in VERBS[verb])) == 3
        assert f"{model / name} is a link to {secret}" in capsys.readouterr().err
        assert not places["out"].exists()
        (model / name).unlink()
        if kept is not None:
            (model / name).write_bytes(kept)


def test_links_inside_the_folder_and_to_it_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "vocab").mkdir()
    (model / "tokenizer.json").rename(model / "vocab" / "tokenizer.json")
    (model / "tokenizer.json").symlink_to("vocab/tokenizer.json")
    (model / "elsewhere").symlink_to(tmp_path)  # a folder: nothing in it is read
    (tmp_path / "link").symlink_to(model)
    for folder in (model, tmp_path / "link"):
        assert load_tokenizer(resolve(folder)).get_vocab_size() == 300


def hub(model: Path, cache: Path) -> Path:
    """The layout of the hub client's cache."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "607a30d", cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in model.iterdir() if path.is_file())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    return snapshot


def test_links_of_the_hub_clients_cache_are_followed(model: Path, secret: Path, tmp_path: Path) -> None:
    snapshot = hub(model, tmp_path / "cache")
    (tmp_path / "home").symlink_to(tmp_path / "cache")  # the cache itself may be behind a link
    for folder in (snapshot, tmp_path / "home" / "models--a--b" / "snapshots" / "607a30d"):
        export_onnx(folder, tmp_path / "device", verify=False)
    assert (tmp_path / "device" / "tokenizer.json").is_file()
    plant(os.symlink, secret, snapshot / "README.md")
    with one_line("outside its folder", "README.md"):
        resolve(snapshot)


def test_a_folder_that_only_looks_like_the_hub_clients_cache_opens_nothing_else(
    model: Path, secret: Path, tmp_path: Path
) -> None:
    snapshot = hub(model, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "models--a--b" / "blobs")
    (tmp_path / "cache" / "models--a--b" / "blobs").symlink_to(secret.parent)
    plant(os.symlink, Path("../../blobs/key.json"), snapshot / "README.md")
    with pytest.raises(InputError, match="outside its folder"):
        resolve(snapshot)
    (snapshot / "blobs").mkdir()  # a chain of links: the first one stays inside
    plant(os.symlink, secret, snapshot / "blobs" / "x")
    for path in snapshot.iterdir():
        if path.is_symlink():
            path.unlink()
    (snapshot / "config.json").symlink_to("blobs/x")
    with one_line("outside its folder", "config.json"):
        resolve(snapshot)


# --- hard links, and files that are not what their name says --------------------------------------------


@pytest.mark.parametrize("name", [name for name in TOKENIZER_FILES if name != "tokenizer_config.json"])
def test_a_hard_link_to_anything_but_a_tokenizer_is_refused(name: str, model: Path, secret: Path) -> None:
    words = load_tokenizer(model)
    if name in ("vocab.json", "merges.txt"):  # read where tokenizer.json is absent
        (model / "tokenizer.json").unlink()
        words.model.save(str(model))
    plant(os.link, secret, model / name)
    with pytest.raises(InputError) as caught:
        load_tokenizer(model)
    assert SECRET not in str(caught.value)


def test_settings_of_a_tokenizer_do_not_carry_other_fields(model: Path, secret: Path, tmp_path: Path) -> None:
    plant(os.link, secret, model / "tokenizer_config.json")
    export_onnx(model, tmp_path / "device", verify=False)
    assert not [path for path in (tmp_path / "device").iterdir() if SECRET.encode() in path.read_bytes()]


REPORTS = {
    "anything": {"password": SECRET},
    "more than a report": {"notes": SECRET},
    "a total with text": {"total": SECRET},
    "other names": {"name": SECRET},
    "other schemes": {"scheme": SECRET},
    "text for a number": {"kl": SECRET},
}


@pytest.mark.parametrize("case", REPORTS)
def test_only_a_report_on_these_weights_is_copied(case: str, model: Path, secret: Path, tmp_path: Path) -> None:
    from benchmarks.report.quantization import report_files

    save_quantized(model, tmp_path / "small", "int8", files=lambda reports: report_files(reports, None))
    path = tmp_path / "small" / REPORT_NAME
    report = json.loads(path.read_text())
    export_onnx(tmp_path / "small", tmp_path / "device", verify=False)
    assert json.loads((tmp_path / "device" / REPORT_NAME).read_text()) == report

    given = REPORTS[case]
    if case == "anything":
        plant(os.link, secret, path)
    else:
        entry = report["tensors"][1]
        (entry if given.keys() & {"name", "scheme", "kl"} else report).update(given)
        if case == "more than a report":
            entry.update(given)
        path.write_text(json.dumps(report))
    shutil.rmtree(tmp_path / "device")
    if case == "more than a report":  # what is no part of one stays behind
        export_onnx(tmp_path / "small", tmp_path / "device", verify=False)
        assert SECRET not in (tmp_path / "device" / REPORT_NAME).read_text()
    else:
        with one_line("is no report on these weights", str(path)):
            export_onnx(tmp_path / "small", tmp_path / "device", verify=False)
        assert not (tmp_path / "device").exists()
