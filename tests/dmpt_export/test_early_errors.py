"""Common mistakes with each verb: reported with the right exit code before torch or ONNX is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmpt_export.cli.main import main
from training.cli.parameters import ABOUT, COMMON, SECTIONS, parameters

HEAVY = ("torch", "transformers", "accelerate", "safetensors", "onnx", "onnx_ir", "onnxruntime")

# Words of a command line -> exit code (2: the command line alone is wrong, 3: files are), the message.
# {gpt2} 4 blocks, 300 tokens, 64 positions; {dmpt}; {int8} quantized; {onnx} exported; {text}; {short}; {full} holds
# somebody's {full}/file; {none} is not there; {out} neither.
MISTAKES: list[tuple[str, int, str]] = [
    ("init {none} {out}", 3, "does not exist: check the path"),
    ("init {full} {out}", 3, "is not a model folder: it has no config.json"),
    ("init {gpt2} {full}", 3, "is not empty and is not a dmpt-export checkpoint folder"),
    ("init {gpt2} {full}/file/out", 3, "file is a file: give another place"),
    ("init {gpt2} {out} --splits 4", 3, "splits [4] do not fit 4 blocks"),
    ("init {gpt2} {out} --heads 3", 3, "3 heads do not divide evenly among 2 leaves"),
    ("init {gpt2} {out} --fast-k 301", 3, "fast_k 301 must be from 1 to the vocabulary size 300"),
    ("init {gpt2} {out} --fast-k 0", 2, "--fast-k"),
    ("init {gpt2} {out} --heads 0", 2, "--heads"),
    ("init {gpt2} {out} --noise nan", 2, "is not a finite number"),
    ("init {dmpt} {out}", 3, "already has splits [2] and 4 head(s)"),
    ("init {int8} {out}", 3, "is already quantized"),
    ("init {onnx} {out}", 3, "is an exported model"),
    ("train {gpt2} {out} --data {text} --epochs 0", 2, "one of --max-steps and --epochs must be above 0"),
    ("train {none} {out} --data {text}", 3, "does not exist: check the path"),
    ("train {gpt2} {out} --data {none}", 3, "does not exist: check the path"),
    ("train {gpt2} {out} --data {full}", 3, "is a folder: give a file"),
    ("train {gpt2} {full} --data {text}", 3, "is not empty and holds no training run"),
    ("train {gpt2} {full} --data {text} --recipe quad", 3, "is not empty and holds no training run"),
    ("train {gpt2} {out} --data {text} --recipe quart", 3, "there is no recipe 'quart'"),
    ("train {gpt2} {out} --data {text} --recipe quad", 3, "splits [6, 9] do not fit 4 blocks"),
    ("train {gpt2} {out} --data {text} --recipe {recipe}", 3, "lr must be a number, not 'fast'"),
    ("train {gpt2} {out} --data {text} --splits 5", 3, "splits [5] do not fit 4 blocks"),
    ("train {gpt2} {out} --data {text} --batch-size 0", 2, "--batch-size 0 must be at least 1"),
    ("train {gpt2} {out} --data {text} --lr nan", 2, "--lr nan must be a number"),
    ("train {gpt2} {out} --data {text} --lr_schedule step", 2, "--lr-schedule 'step': choose one of linear"),
    ("train {gpt2} {out} --data {text} --eval-length 65", 3, "--eval-length 65 must be at most the model's context"),
    ("train {gpt2} {out} --data {text} --train-path-selection up", 3, "unknown --train-path-selection 'up'"),
    ("train {dmpt} {out} --data {text} --head-topk 3", 3, "head_topk 3 must be from 1 to the heads of a leaf (2)"),
    ("train {gpt2} {out} --data {text} --freeze-schedule {none}", 3, "cannot be read"),
    ('train {gpt2} {out} --data {text} --freeze-schedule {{"0":{{"lefty":true}}}}', 3, "group 'lefty' is unknown"),
    ("train {gpt2} {out} --data {text} --resume", 3, "no trainer_state"),
    ("train {int8} {out} --data {text}", 3, "is already quantized"),
    ("train --from-scratch {out} --data {text}", 2, "--from-scratch needs --tokenizer"),
    ("train --from-scratch {out} --data {text} --tokenizer {full}", 3, "has no tokenizer"),
    ("train --from-scratch {out} --data {text} --tokenizer {gpt2} --n-embd 30 --n-head 4", 2, "multiple of n_head 4"),
    ("quantize {none} {out} --scheme int8", 3, "does not exist: check the path"),
    ("quantize {int8} {out} --scheme int8", 3, "is already quantized"),
    ("quantize {gpt2} {full} --scheme int8", 3, "is not empty and is not a dmpt-export quantized folder"),
    ("quantize {gpt2} {out} --scheme int5", 2, "'int5' is not one of int8"),
    ("quantize {gpt2} {out} --scheme delta-r16", 2, "give a scheme for the rest and a rule 'heads.*=delta-r16'"),
    ("quantize {gpt2} {out} --scheme int2 --block 256", 2, "blocks from 32 to 128"),
    ("quantize {gpt2} {out} --scheme int8 --rule heads.*", 2, "is not of the form"),
    ("quantize {gpt2} {out} --scheme int8 --rule *=int9", 2, "unknown scheme 'int9'"),
    ("quantize {gpt2} {out} --scheme int8 --rule heads.3=int4", 3, "matches no tensor"),
    ("quantize {gpt2} {out} --scheme int8 --rule *.ln_1=int4", 3, "always stays float32"),
    ("quantize {gpt2} {out} --scheme int8 --rule *=delta-r16", 3, "only a head can be a delta"),
    ("quantize {gpt2} {out} --scheme int4-gptq", 2, "needs calibration text: give some with --calib"),
    ("quantize {gpt2} {out} --scheme int4 --calib {none}", 3, "is not a file"),
    # counting tokens needs a tokenizer, and a foreign folder's needs Transformers
    ("quantize {dmpt} {out} --scheme int4 --calib {short}", 3, "calibration needs 64 or more"),
    ("quantize {gpt2} {out} --scheme int8 --smooth 0.5 --calib {text}", 2, "leave --smooth out"),
    ("quantize {gpt2} {out} --scheme int8-dynamic --smooth 0.5", 2, "give some with --calib"),
    ("quantize {gpt2} {out} --plan {none}", 3, "is missing"),
    ("quantize {gpt2} {out} --plan {gpt2}/config.json", 3, "is not a plan"),
    ("quantize {gpt2} {out} --target-size 1MB", 2, "give some with --calib"),
    ("quantize {gpt2} {out} --target-size 1KB --calib {text}", 3, "no plan fits 0.001 MB: with --candidates"),
    ("quantize {gpt2} {out} --target-bits 3 --candidates int8 --calib {text}", 3, "no plan fits 3 bits per weight"),
    ("quantize {gpt2} {out} --target-bits 4 --candidates int7 --calib {text}", 2, "unknown scheme 'int7'"),
    ("quantize {gpt2} {out} --target-bits 9 --candidates nf4 --calib {text}", 3, ""),
    ("quantize {gpt2} {out} --target-size nan --calib {text}", 2, "is not a size"),
    ("onnx {none} {out}", 3, "does not exist: check the path"),
    ("onnx {onnx} {out}", 3, "is an exported model"),
    ("onnx {gpt2} {full}", 3, "is not empty and is not a dmpt-export onnx folder"),
    ("onnx {gpt2} {out} --fast-k 301", 3, "fast_k 301"),
    ("onnx {gpt2} {out} --target cuda --kv-cache int8", 2, "--target cpu"),
    ("onnx {gpt2} {out} --target web --rule heads.*=int8", 2, "--rule and --vocab-scheme need --scheme"),
    ("onnx {gpt2} {out} --vocab-scheme int8", 2, "--rule and --vocab-scheme need --scheme"),
    ("onnx {gpt2} {out} --scheme int8 --vocab-scheme nf4", 2, "'nf4' is not one of int8, int8-dynamic"),
    ("onnx {none} {out} --target web", 3, "does not exist: check the path"),
    ("quantize {gpt2} {out} --vocab-scheme int8 --plan {none}", 2, "--vocab-scheme needs --scheme"),
    ("onnx {gpt2} {out} --atol nan", 2, "is not a finite number"),
    ("onnx {gpt2} {out} --kv-cache int8 --calib {none}", 3, "does not exist"),
    ("check {none}", 3, "is not a folder"),
    ("check {dmpt}", 3, "is a checkpoint: export it with `dmpt-export onnx"),
    ("check {onnx}", 3, "has no dmpt_proof.json: it was exported by an earlier dmpt-export, or with --no-verify"),
    ("check {onnx} --threads 0", 2, "threads 0 must be"),
    ("runn {onnx} hello", 2, "No such command 'runn': did you mean run?"),
    ("run {none} hello", 3, "is not a folder"),
    ("run {gpt2} hello", 3, "is a checkpoint: export it with `dmpt-export onnx"),
    ("run {onnx} hello --top-p 2", 2, "top_p 2.0 must be"),
    ("run {onnx} hello --min-p 2", 2, "min_p 2.0 must be"),
    ("run {onnx} hello --logit-bias 7", 2, "'7' is not of the form ID=BIAS"),
    ("run {onnx} hello --logit-bias 7=nan", 2, "logit_bias 7: nan must be"),
    ("run {onnx} hello --temperature -1", 2, "temperature -1.0 must be"),
    ("run {onnx} hello --threads 0", 2, "threads 0 must be"),
    ("serve {none} --port 0", 3, "is not a folder"),
    ("serve {gpt2} --port 0", 3, "is a checkpoint: export it with `dmpt-export onnx"),
    ("serve {onnx} --port 65536", 2, "--port 65536 must be from 0 (a free one) to 65535"),
    ("serve {onnx} --parallel 0", 2, "--parallel"),
    ("serve {onnx} --max-texts 81", 2, "--max-texts 81 is more than --parallel and --queue can hold"),
    ("serve {onnx} --threads 0", 2, "threads 0 must be"),
    ("serve {onnx} --grace nan", 2, "is not a finite number"),
    ("serve {onnx} --host no.such.host.invalid", 2, "--host no.such.host.invalid is no address"),
    ("serve {onnx} --api-key-file {none}", 3, "No such file or directory"),
    ("serve {onnx} --api-key-file {empty}", 3, "holds no key: give one a line"),
    ("eval {none} --data {text}", 3, "does not exist: check the path"),
    ("eval {gpt2} --data {none}", 3, "does not exist: check the path"),
    ("eval {gpt2} --data {text} --max-length 65", 3, "from 2 to the model's context of 64"),
    ("eval {gpt2} --data {text} --max-length 32 --stride 33", 2, "--stride 33 must be from 1"),
    ("eval {gpt2} --data {text} --protocol non-overlapping --stride 8", 2, "leave --stride out"),
    ("eval {gpt2} --data {text} --mode sideways", 3, "unknown path mode 'sideways'"),
    ("eval {gpt2} --data {text} --fast-k 301", 3, "fast_k 301"),
    ("eval {onnx} --data {text} --max-length 65", 3, "from 2 to the model's context of 64"),
    ("eval {onnx} --data {text} --fast-k 8", 3, "has a fixed fast-k"),
    ("eval {onnx} --data {text} --base {none}", 3, "does not exist: check the path"),
    ("compare {none}", 3, "does not exist: check the path"),
    ("compare {gpt2} x={none}", 3, "does not exist: check the path"),
    ("compare {gpt2} --data {none}", 3, "does not exist: check the path"),
    ("compare {gpt2} --out {full}", 3, "is not empty and is not a dmpt-export comparison folder"),
    ("compare {gpt2} --data {text} --resume {full}/file/x", 3, "file is a file: give another place"),
    ("compare {gpt2} --max-length 65 --data {text}", 3, "must be from 2 to the model's context of 64"),
    ("compare {gpt2} --stride 70 --max-length 64 --data {text}", 2, "--stride 70 must be"),
    ("compare {gpt2} ovino:int8@{gpt2}", 2, "unknown peer 'ovino'"),
    ("compare {gpt2} openvino:int3@{gpt2}", 2, "not 'int3'"),
    ("compare {gpt2} --control x", 2, "--control x is not among the models"),
    ("compare {gpt2} --growth {text}", 2, "is not the output of `dmpt-export bench --json`"),
    ("compare {gpt2} --peers {none}", 3, "does not exist: check the path"),
    ("bench {none}", 3, "does not exist"),
    ("bench {gpt2}", 3, "export it first"),
    ("bench {onnx} -p 64 -n 1", 3, "do not fit a context of 64"),
    ("bench {onnx} --report {full}/file/bench.html", 3, "file is a file: give another place"),
    ("inspect {none}", 3, "does not exist: check the path"),
    ("inspect {gpt2} --data {none}", 3, "does not exist: check the path"),
    ("convert {none} {out}", 3, "does not exist or is not a file"),
    ("convert {text} {out}", 3, "is not a PyTorch checkpoint"),
    ("convert {gpt2} {full}", 3, "is not empty and is not a dmpt-export checkpoint folder"),
    ("convert {dmpt} {out}", 3, "is a folder: give a .pt file, or --heads projected"),
    ("convert {dmpt} {out} --calib {text}", 2, "--head-rank and --calib are for --heads projected"),
    ("convert {dmpt} {out} --head-rank 4", 2, "--head-rank and --calib are for --heads projected"),
    ("convert {dmpt} {out} --heads full --calib {text}", 2, "'full' is not 'projected'"),
    ("convert {dmpt} {out} --heads projected", 2, "fitted on calibration text: give some with --calib"),
    ("convert {dmpt} {out} --heads projected --calib {text} --n-head 4", 2, "leave them out with --heads"),
    ("convert {dmpt} {out} --heads projected --calib {text} --head-rank 0", 2, "--head-rank"),
    ("convert {dmpt} {out} --heads projected --calib {text} --head-rank 33", 3, "--head-rank 33 must be from 1 to"),
    ("convert {dmpt} {out} --heads projected --calib {none}", 3, "is not a file"),
    ("convert {dmpt} {out} --heads projected --calib {short}", 3, "calibration needs 64 or more"),
    ("convert {dmpt} {out} --heads projected --calib {text} --calib-tokens 64", 3, "or more --calib-tokens"),
    ("convert {text} {out} --heads projected --calib {text}", 3, "is a file, a model is a folder"),
    ("convert {none} {out} --heads projected --calib {text}", 3, "does not exist: check the path"),
    ("convert {int8} {out} --heads projected --calib {text}", 3, "is already quantized"),
    ("convert {gpt2} {out} --heads projected --calib {text}", 3, "no head of this model can be projected"),
    ("demo --out {full}", 3, "was not made by `dmpt-export demo`"),
    ("demo --out {full}/file/out", 3, "file is a file: give another place"),
    ("demo --out {out} --data {none}", 3, "does not exist"),
    ("demo --out {out} --scale 0", 2, "--scale"),
]


@pytest.fixture(scope="module")
def places(
    tiny_gpt2: Path, tiny_dmpt: Path, sample_text: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    from dmpt_export.onnx.export import export_onnx
    from quant.checkpoint import save_quantized

    folder = tmp_path_factory.mktemp("early")
    save_quantized(tiny_dmpt, folder / "int8", "int8")
    export_onnx(tiny_gpt2, folder / "onnx", verify=False)
    (folder / "text.txt").write_text(sample_text, encoding="utf-8")
    (folder / "empty").touch()
    (folder / "short").write_text("a mill")
    (folder / "recipe").write_text('{"phases": [{"lr": "fast"}]}')
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("years of work")
    names = {name: folder / name for name in ("int8", "onnx", "full", "none", "out", "recipe", "short", "empty")}
    return {key: str(path) for key, path in (names | {"gpt2": tiny_gpt2, "dmpt": tiny_dmpt}).items()} | {
        "text": str(folder / "text.txt")
    }


@pytest.fixture(scope="module")
def told(places: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The outcome of every mistake; all run in one process, which must stay free of heavy imports."""
    lines = [line.format(**places).split() for line, _, _ in MISTAKES]
    code = (
        "import contextlib, io, json, sys\n"
        "from dmpt_export.cli.main import main\n"
        "found, before = [], set()\n"
        "for line in json.load(sys.stdin):\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err):\n"
        "        code = main(line)\n"
        f"    heavy = {set(HEAVY)!r} & set(sys.modules)\n"
        "    found.append({'code': code, 'err': err.getvalue(), 'heavy': sorted(heavy - before)})\n"
        "    before |= heavy\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", code]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return dict(zip([line for line, _, _ in MISTAKES], json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("line", "code", "message"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_is_told_before_anything_heavy_is_imported(
    line: str, code: int, message: str, told: dict[str, dict[str, Any]], places: dict[str, str]
) -> None:
    found = told[line]
    assert (found["code"], found["heavy"]) == (code, []), found["err"]
    assert message in found["err"]
    assert "Traceback" not in found["err"]
    assert code == 2 or found["err"].count("\n") == 1
    assert not Path(places["out"]).exists()
    assert os.listdir(places["full"]) == ["file"]


def test_an_export_tells_the_size_that_compare_tells(places: dict[str, str]) -> None:
    from benchmarks.quality.scorer import onnx_size
    from dmpt_export.cli.onnx import report

    folder = Path(places["onnx"])
    manifest = json.loads((folder / "dmpt_manifest.json").read_text())
    whole = sum(path.stat().st_size for path in folder.iterdir() if path.name != "dmpt_manifest.json")
    said = report(manifest, "out")
    assert f"graph and weights {onnx_size(folder) / 1e6:.1f} MB ({whole / 1e6:.1f} MB with tokenizer" in said


@pytest.mark.parametrize("verb", ["train", "quantize", "eval"])
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = (
        f"import sys\nfrom dmpt_export.cli.main import main\nassert main([{verb!r}, '--help']) == 0\n"
        f"assert not set({HEAVY!r}) & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_help_of_train_says_what_recipes_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "_steps" not in said
    for name, steps in (("deployed", "steps set by --epochs or --max-steps"), ("quad", "2 phases, 42,000 steps")):
        assert f"{name} " in said.partition("Recipes:")[2]
        assert f"[{steps}]" in said


def test_the_help_of_train_shows_what_people_use_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--help-all"]) == 0
    whole = capsys.readouterr().out
    options = [name for parameter in parameters() for name in parameter.opts[:1] if name.startswith("--")]
    missing = [name for name in options if f"  {name}" not in whole and f", {name}" not in whole]
    assert missing == []
    used = [name for name in options if f"  {name}" in short]
    assert 18 <= len(used) <= 26
    assert f"--help-all shows {len(options) - len(used)} more options" in short
    assert "--gold-aux-coef teaches gates" in " ".join(whole.split())
    assert "--help" in short.replace("--help-all", "")
    assert set(ABOUT) <= set(SECTIONS.values())
    assert {parameter.name for parameter in parameters()} >= COMMON


def test_phases_are_named_on_a_terminal_alone(
    tiny_gpt2: Path,
    sample_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text(sample_text * 2, encoding="utf-8")
    line = ["quantize", str(tiny_gpt2), "--dry-run", "--scheme", "int4-gptq", "--calib", str(tmp_path / "text")]
    assert main(line) == 0
    assert "..." not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(line) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "loading PyTorch ..."
    assert said[1].endswith("and running the float model on it ...")


def test_a_gpu_that_is_not_there_is_one_line(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["eval", places["gpt2"], "--data", places["text"], "--device", "cuda"]) == 3
    assert capsys.readouterr().err.startswith("Error: --device cuda: torch finds no usable GPU")
