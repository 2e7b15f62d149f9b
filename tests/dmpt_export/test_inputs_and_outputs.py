"""Inputs and outputs of verbs: no input inside OUT, impossible places, closed streams, pipes, odd names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runtime
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import save_quantized
from tests.helpers.paths import REPOSITORY
from training.checkpoints.files import cache_folder
from training.checkpoints.places import check_inputs, check_place
from training.errors import InputError

LINES = "The tide mill waits for the tide .\n" * 40


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def direct(path: Path, _outside: Path) -> Path:
    return path


def by_link(path: Path, outside: Path) -> Path:
    link = outside / f"link-{path.name}"
    link.symlink_to(path)
    return link


def by_dots(path: Path, _outside: Path) -> Path:
    return path.parent / "nothing" / ".." / path.name


WAYS = [direct, by_link, by_dots]


@pytest.fixture
def run(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A finished training run with files of every kind that a verb may be given."""
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(LINES)
    assert main(["train", str(tiny_gpt2), str(out), "--data", str(text), *STEPS, "--cache-dir", str(tmp_path)]) == 0
    for name in ("text.txt", "allocation.json", "recipe.json", "schedule.json"):
        (out / name).write_text(LINES if name == "text.txt" else "{}")
    (out / "nothing").mkdir()
    return out


STEPS = ["--max-steps", "1", "--max-length", "16", "--batch-size", "1"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "arguments",
    [
        "{last} {out} --data {text} --overwrite",
        "{gpt2} {out} --data {inside} --overwrite",
        "{gpt2} {out} --data {text} --eval-data {inside} --overwrite",
        "{gpt2} {out} --data {text} --tokenizer {last} --overwrite",
        "{gpt2} {out} --data {text} --head-allocation {allocation} --overwrite",
        "{gpt2} {out} --data {text} --freeze-schedule {schedule} --overwrite",
        "{gpt2} {out} --data {text} --cache-dir {nothing} --overwrite",
        "--from-scratch {out} --tokenizer {last} --data {text} --overwrite",
    ],
)
def test_train_keeps_what_it_is_given(
    arguments: str, way: Callable[[Path, Path], Path], run: Path, tiny_gpt2: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    outside = tmp_path / "outside"
    outside.mkdir()
    inside = {"last": "last", "inside": "text.txt", "allocation": "allocation.json", "schedule": "schedule.json",
              "nothing": "nothing"}  # fmt: skip
    places = {name: way(run / file, outside) for name, file in inside.items() if f"{{{name}}}" in arguments}
    places |= {"gpt2": tiny_gpt2, "out": run, "text": tmp_path / "text.txt"}
    before = tree(run)
    assert main(["train", *arguments.format(**places).split(), *STEPS]) == 3
    assert "which would be replaced" in capsys.readouterr().err
    assert tree(run) == before


@pytest.mark.parametrize("way", WAYS)
def test_check_inputs(way: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    (out / "deep" / "er").mkdir(parents=True)
    outside.mkdir()
    (out / "file").write_text("x")
    (out / "nothing").mkdir()
    (out / "deep" / "nothing").mkdir()
    for path in (out / "file", out / "deep", out / "deep" / "er"):
        with pytest.raises(InputError, match="would be replaced"):
            check_inputs(out, way(path, outside))
    with pytest.raises(InputError, match="would be replaced"):
        check_inputs(out, None, "gpt2", tmp_path / "absent", out)
    check_inputs(out, None, "gpt2", tmp_path / "absent", tmp_path)
    check_inputs(tmp_path / "new", out / "file")


def test_a_folder_that_links_into_out_is_an_input_there(tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    out.mkdir()
    model.mkdir()
    (out / "model.safetensors").write_text("x")
    (model / "model.safetensors").symlink_to(out / "model.safetensors")
    with pytest.raises(InputError, match="model lies in"):
        check_inputs(out, model)
    (model / "model.safetensors").unlink()
    os.link(out / "model.safetensors", model / "model.safetensors")  # stays when OUT goes
    check_inputs(out, model)


@pytest.mark.parametrize("verb", ["quantize", "onnx", "init", "convert"])
def test_other_verbs_keep_what_they_are_given(
    verb: str, tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out", tmp_path / "out" / "text.md"  # a name that an OUT of ours may hold
    if verb == "quantize":
        save_quantized(tiny_dmpt, out, "int8")
        text.write_text(LINES)
        arguments = [str(tiny_dmpt), str(out), "--scheme", "int4-gptq", "--calib", str(text)]
    elif verb == "onnx":
        export_onnx(tiny_dmpt, out, verify=False)
        text.write_text(LINES)
        arguments = [str(tiny_dmpt), str(out), "--kv-cache", "int8", "--calib", str(text)]
    elif verb == "init":
        assert main(["init", str(tiny_gpt2), str(out), "--splits", "none", "--heads", "1"]) == 0
        arguments = [str(out), str(out), "--splits", "2"]
    else:
        assert main(["init", str(tiny_gpt2), str(out), "--splits", "none", "--heads", "1"]) == 0
        (out / "original.json").write_bytes(b"PK\x05\x06" + bytes(18))  # an empty archive
        arguments = [str(out / "original.json"), str(out)]
    before = tree(out)
    assert main([verb, *arguments, "--overwrite"]) == 3
    assert "which would be replaced" in capsys.readouterr().err
    assert tree(out) == before


def test_a_report_does_not_replace_a_model(tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_onnx(tiny_gpt2, tmp_path / "device", verify=False)
    before = tree(tmp_path / "device")
    assert (
        main(["bench", str(tmp_path / "device"), "--report", str(tmp_path / "device" / "model.onnx"), "--overwrite"])
        == 3
    )
    assert "is a file of" in capsys.readouterr().err
    assert tree(tmp_path / "device") == before


# --- places -------------------------------------------------------------------------------------------


def test_names_that_are_too_long_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"too long: give one of at most \d+ bytes"):
        check_place(tmp_path / ("x" * 250))
    longest = tmp_path / ("x" * 236)
    check_place(longest)
    (longest.with_name(f".{longest.name}.tmp-01234567")).mkdir()  # what writing it makes


@pytest.mark.parametrize("verb", ["quantize", "onnx", "init"])
def test_every_verb_tells_a_bad_place_first(
    verb: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scheme", "int8"] if verb == "quantize" else []
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    odd = os.fsdecode(b"caf\xe9")
    for name, message in (("x" * 250, "too long"), ("loop", "cannot be used"), (odd, r"caf\xe9 is not UTF-8")):
        assert main([verb, str(tiny_gpt2), str(tmp_path / name), *options]) == 3
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["quantize", "onnx", "init", "train"])
def test_widths_that_no_export_takes_are_told_by_every_verb(
    verb: str, make_gpt2: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_gpt2(tmp_path / "m", n_embd=24, n_head=2)
    (tmp_path / "text").write_text(LINES)
    options = {"quantize": ["--scheme", "int8"], "train": ["--data", str(tmp_path / "text")]}.get(verb, [])
    assert main([verb, str(tmp_path / "m"), str(tmp_path / "out"), *options]) == 3
    assert "attention heads are 12 wide (n_embd 24 / n_head 2)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_home_directory_caches_are_temporary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    place = cache_folder()
    assert cache_folder() == place
    err = capsys.readouterr().err
    assert err.count("there is no home directory") == 1
    assert str(place) in err


# --- names, links and streams ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["gpt2", "quantized", "device"])
def test_model_folders_whose_names_are_not_utf8(
    file: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    if file == "gpt2":
        shutil.copytree(tiny_gpt2, folder)
        verbs = [["onnx", str(folder), str(tmp_path / "x")], ["eval", str(folder), "--data", __file__]]
    elif file == "quantized":
        save_quantized(tiny_gpt2, tmp_path / "q", "int8")
        (tmp_path / "q").rename(folder)
        verbs = [["onnx", str(folder), str(tmp_path / "x")]]
    else:
        export_onnx(tiny_gpt2, tmp_path / "d", verify=False)
        (tmp_path / "d").rename(folder)
        verbs = [["run", str(folder), "x"]]
    for verb in verbs:
        assert main(verb) == 3
        err = capsys.readouterr().err
        assert r"caf\xe9 is not UTF-8" in err
        assert "damaged" not in err


def test_weights_that_may_not_be_read_are_not_called_missing(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The safetensors library says that they are missing; root may read everything, so opening is made to fail."""

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    save_quantized(tiny_gpt2, tmp_path / "q", "int8")
    monkeypatch.setattr("training.checkpoints.tensors.check_readable", refused)
    monkeypatch.setattr("quant.folder.check_readable", refused)
    for folder in (tiny_gpt2, tmp_path / "q"):
        assert main(["onnx", str(folder), str(tmp_path / "device")]) == 3
        err = capsys.readouterr().err
        assert "model.safetensors cannot be read: Permission denied" in err


def test_device_folders_copied_with_hard_links_stay_usable(tiny_gpt2: Path, tmp_path: Path) -> None:
    export_onnx(tiny_gpt2, tmp_path / "device", verify=False)
    shutil.copytree(tmp_path / "device", tmp_path / "copy", copy_function=os.link)
    with runtime.load(tmp_path / "copy") as model:
        assert len(model.generate([5, 6], max_new_tokens=2)) == 2
    with pytest.raises(runtime.ModelError, match="is a symbolic or hard link"):
        runtime.load(tmp_path / "copy", verify=False)
    other = tmp_path / "secret"
    other.write_bytes((tmp_path / "device" / "model.onnx").read_bytes()[::-1])
    (tmp_path / "copy" / "model.onnx").unlink()
    os.link(other, tmp_path / "copy" / "model.onnx")
    with pytest.raises(runtime.ModelError, match="a different sha256"):
        runtime.load(tmp_path / "copy")


def dmpt_export(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A shell script in which `$D` is the command."""
    environment = os.environ | {"D": f"{sys.executable} -m dmpt_export", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True,
                          errors="surrogateescape")  # fmt: skip


def test_pipes_and_closed_streams(tiny_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(LINES)
    shutil.copytree(tiny_gpt2, tmp_path / "m")
    steps = " ".join(STEPS)
    script = f"""set -e
        export PYTHONPATH={REPOSITORY}
        $D train m tuned --data <(cat text) --eval-data=<(cat text) {steps} --cache-dir cache 2>&-
        $D quantize tuned q --scheme int8 --calib <(cat text) --calib-tokens 64 >&- 2>&-
        $D onnx q device 2>&-
        $D run device "Über" -n 2 --json 2>&- > out.json
        LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $D run device "Über" -n 2 --json > ascii.json
        LC_ALL=C $D run device "Über" -n 2 --json > c.json
    """
    done = dmpt_export(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    ids = [(tmp_path / name).read_text().partition("load_s")[0] for name in ("out.json", "ascii.json", "c.json")]
    assert ids[0] == ids[1] == ids[2]
    with runtime.load(tmp_path / "device") as model:
        assert f'"prompt_tokens": {len(model.encode("Über"))},' in ids[0]


@pytest.mark.parametrize("prompt", ["- item", "-v is one", "--", "-1", "--help me"])
def test_a_prompt_that_begins_with_a_dash_names_the_way(
    prompt: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_onnx(tiny_gpt2, tmp_path / "device", verify=False)
    if prompt != "--":
        assert main(["run", str(tmp_path / "device"), prompt]) == 2
        assert "that begins with - after --" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "device"), "-n", "1", "--", prompt]) == 0
