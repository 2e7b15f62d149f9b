"""`dmpt-export train` from its command line to its output folder; also in two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import distributed

from dmpt_export.cli.main import main
from dmpt_export.cli.train import command
from tests.helpers.models import random_model
from tests.helpers.tolerances import TOLERANCE
from training.checkpoints.checkpoint import load_model, read_config, save_model
from training.cli.command import request_of
from training.cli.recipes import names, read_recipe

SMALL = [
    "--max-steps", "2", "--max-length", "16", "--batch-size", "2", "--grad-accum-steps", "1", "--log-every", "1",
    "--cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path, sample_text: str) -> str:
    path = tmp_path / "text.txt"
    path.write_text(sample_text, encoding="utf-8")
    return str(path)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def options_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "last" / "trainer_state" / "state.json").read_text())["options"])


def test_a_dmpt_is_trained_into_a_checkpoint(
    tiny_dmpt: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    assert main(["train", str(tiny_dmpt), str(out), "--data", text, "--eval-data", text, *SMALL]) == 0
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint == f"next: dmpt-export onnx {out} DEVICE --scheme int8"
    assert main(hint.replace("DEVICE", str(tmp_path / "device")).split()[2:]) == 0
    config = read_config(out)
    assert (config.splits, config.fast_k) == ([2], 16)
    assert (out / "tokenizer.json").is_file()
    assert (out / "best" / "tokenizer.json").is_file()
    assert load_model(out).num_parameters() == load_model(tiny_dmpt).num_parameters()
    assert [set(record) & {"loss", "eval_loss"} for record in metrics(out)] == [{"loss"}, {"loss"}, {"eval_loss"}]


@pytest.mark.parametrize("options", ["--head-kind projected --shared-anchor", "--splits 1 --heads 4"])
def test_a_dmpt_that_keeps_its_shape_is_noted(
    options: str, tiny_dmpt: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with click.Context(command, info_name="train") as context:
        command.parse_args(context, [str(tiny_dmpt), str(tmp_path / "out"), "--data", text, *options.split()])
        request_of(context).check()
    named = ", ".join(part for part in options.split() if part.startswith("--"))
    assert f"note: the model keeps its shape, so {named} has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("--head-kind projected", 0, ""),
        ("--splits 2 --head-rank 4", 2, "--head-rank and --shared-anchor need --head-kind projected"),
        ("--shared-anchor", 2, "--head-rank and --shared-anchor need --head-kind projected"),
    ],
)
def test_train_makes_projected_heads_of_a_gpt2(
    options: str, code: int, said: str, tiny_gpt2: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", str(tiny_gpt2), str(tmp_path / "out"), "--data", text, *options.split(), *SMALL]
    assert main(line) == code
    assert said in capsys.readouterr().err
    assert code or read_config(tmp_path / "out").projected_heads == [1, 2, 3, 5, 6, 7]


def test_the_recommended_recipe_fits_a_shallow_gpt2(tiny_gpt2: Path, text: str, tmp_path: Path) -> None:
    line = ["train", str(tiny_gpt2), str(tmp_path / "out"), "--data", text, "--recipe", "deployed", *SMALL]
    assert main([*line, "--fast-k", "16"]) == 0
    assert read_config(tmp_path / "out").splits == [2]


@pytest.mark.parametrize(
    ("options", "kind", "shared"),
    [("", "projected", True), ("--head-kind full", "full", False), ("--head-rank 3", "projected", True)],
)
def test_what_options_make_of_the_recipes_heads(
    options: str, kind: str, shared: bool, tiny_gpt2: Path, text: str, tmp_path: Path
) -> None:
    line = ["train", str(tiny_gpt2), str(tmp_path / "out"), "--data", text, "--recipe", "deployed", *SMALL]
    assert main([*line, "--fast-k", "8", "--heads", "4", *options.split()]) == 0
    config = read_config(tmp_path / "out")
    assert (config.head_kind, config.shared_anchor) == (kind, shared)
    assert config.head_rank == (3 if "rank" in options else None)


def test_without_head_mixture_every_leaf_has_one_head(tiny_gpt2: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["train", str(tiny_gpt2), str(out), "--data", text, "--splits", "1,2", "--no-use_head_mixture", *SMALL]
    assert main(line) == 0
    assert [len(heads) for heads in read_config(out).head_allocation.values()] == [1, 1, 1, 1]


def test_resume_needs_nothing_but_the_run(tiny_gpt2: Path, text: str, tmp_path: Path) -> None:
    """Options and data come from the run; repeated options override them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [*SMALL, "--lr", "1e-3", "--lr-schedule", "constant", "--warmup-steps", "0"]
    for out, steps in ((whole, "4"), (parts, "2")):
        assert main(["train", str(tiny_gpt2), str(out), "--data", text, *settings, "--max-steps", steps]) == 0
    assert main(["train", "--out", str(parts), "--resume", "--max_steps", "4"]) == 0
    assert [record["loss"] for record in metrics(parts)] == [record["loss"] for record in metrics(whole)]
    assert options_of(parts)["lr"] == 1e-3
    assert torch.equal(load_model(parts).transformer.wte.weight, load_model(whole).transformer.wte.weight)


def test_a_new_gpt2_can_be_started_from_nothing(tokenizer_folder: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "new"
    sizes = "--n_layer 2 --n_embd 16 --n_head 2 --n_positions 32".split()
    line = ["train", "--from-scratch", str(out), "--tokenizer", str(tokenizer_folder), "--data", text, *sizes, *SMALL]
    assert main(line) == 0
    config = read_config(out)
    assert (config.n_layer, config.n_embd, config.n_positions, config.vocab_size) == (2, 16, 32, 300)
    assert config.splits == []
    assert config.tie_word_embeddings
    given = options_of(out)  # defaults that fit random weights, unless the command line says otherwise
    assert (given["head_lr"], given["freeze_head0_steps"], given["tether_coef"]) == (6e-4, 0, 0.0)


SCRATCH = "--from-scratch --n-layer 2 --n-embd 16 --n-head 2 --n-positions 32 --tokenizer {tokenizer} {out} --splits 1"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (SCRATCH, None),
        (f"{SCRATCH} --lr 2e-4 --head-lr 1e-3 --warmup-steps 1", None),
        (
            f"{SCRATCH} --lr 2e-5 --warmup-steps 0 --freeze-head0-steps 5000",
            "a model from scratch: --lr 2e-05 (usual: 0.0006), --warmup-steps 0 (usual: 200), "
            "--freeze-head0-steps 5000 (usual: 0)",
        ),
        (
            f"{SCRATCH} --splits none --heads 1 --freeze-head0-steps 5000 --head-lr 5e-6",
            None,
        ),  # the head is the embedding
        (f"{SCRATCH} --freeze-all-transformer", "a model from scratch: --freeze-all-transformer True (usual: False)"),
        ("{gpt2} {out} --lr 6e-4", None),  # 64 wide
        ("{wide} {out} --lr 2e-4 --warmup-steps 0 --freeze-head0-steps 5000", None),
        ("{wide} {out} --lr 6e-4", "fine-tuning a model 768 wide: --lr 0.0006 (usual: 2e-05)"),
        ("{wide} {out} --head-lr 6e-4", None),  # its only head is the embedding
    ],
)
def test_options_that_suit_another_start_are_one_warning(
    line: str, named: str | None, tiny_gpt2: Path, tokenizer_folder: Path, text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wide = tmp_path / "wide"
    if "{wide}" in line:
        save_model(random_model([], 1, n_embd=768, n_layer=1, vocab_size=300), wide, tokenizer_from=tokenizer_folder)
    places = {"gpt2": tiny_gpt2, "wide": wide, "tokenizer": tokenizer_folder, "out": tmp_path / "out"}
    with click.Context(command, info_name="train") as context:
        command.parse_args(context, [*line.format(**places).split(), "--data", text, "--max-steps", "2"])
        request_of(context).check()
    warned = [said for said in capsys.readouterr().err.splitlines() if said.startswith("Warning: ")]
    assert warned == ([] if named is None else [f"Warning: unusual for {named}"])


def test_a_resumed_run_is_not_warned_again(
    tokenizer_folder: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*SCRATCH.format(tokenizer=tokenizer_folder, out=tmp_path / "out").split(), "--data", text, *SMALL]
    line += ["--heads", "2", "--warmup-steps", "0"]
    assert main(["train", *line]) == 0
    assert "Warning: unusual" in capsys.readouterr().err
    assert main(["train", *line, "--resume", "--max-steps", "3"]) == 0
    assert "Warning" not in capsys.readouterr().err


def test_a_recipe_trains_its_phases_and_the_command_line_wins(tiny_gpt2: Path, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    phases = [{"max_steps": 1, "lr": 1e-3, "lb_coef": 0.5}, {"train_path_selection": "gate_hard"}]
    recipe.write_text(json.dumps({"about": "a test", "init": {"splits": [2], "heads": 4}, "phases": phases}))
    out = tmp_path / "out"
    line = ["train", str(tiny_gpt2), str(out), "--data", text, "--recipe", str(recipe), *SMALL, "--lb-coef", "0.25"]
    assert main(line) == 0
    first, second = options_of(out / "phase-1"), options_of(out / "phase-2")
    assert (first["lr"], first["lb_coef"], first["max_steps"]) == (1e-3, 0.25, 2)
    assert (second["train_path_selection"], second["lb_coef"]) == ("gate_hard", 0.25)
    assert torch.equal(load_model(out).heads[1].weight, load_model(out / "phase-2").heads[1].weight)
    assert read_config(out).n_vocab_heads == 4


@pytest.mark.parametrize("name", names())
def test_the_recipes_can_be_read(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.about
    assert recipe.phases
    assert ("splits" in recipe.init) == (name not in ("deployed", "best"))  # which take half the depth


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("{gpt2} {out} --recipe none", 3, "there is no recipe 'none'"),
        ("{gpt2} --data {text}", 2, "OUT is missing"),
        ("--out {out} --data {text}", 2, "MODEL is missing"),
        ("--from-scratch {out} --data {text}", 2, "needs --tokenizer"),
        ("{gpt2} {out} more --data {text}", 2, "unexpected extra argument"),
        ("{gpt2} more --out {out} --model {gpt2} --data {text}", 2, "is too much"),
        ("{gpt2} {out} --data {text} --splits six", 2, "is neither a list of block indices"),
        ("{tmp}/none {out} --data {text}", 3, "does not exist"),
        ("{gpt2} {out} --data {tmp}/none.txt", 3, "does not exist: check the path"),
        ("{gpt2} {out} --data {empty}", 3, "is empty"),
        ("{gpt2} {out} --data {latin}", 3, "is not UTF-8"),
        ("{gpt2} {tmp}/full --data {text}", 3, "is not empty and holds no training run"),
        ("{gpt2} {text} --data {text}", 3, "is a file"),
        ("{gpt2} {out} --data {text} --splits 9", 3, "do not fit 4 blocks"),
        ("{gpt2} {out} --data {text} --recipe none", 3, "there is no recipe"),
        ("{gpt2} {out} --data {text} --resume", 3, "no trainer_state"),
        ("{gpt2} {out} --data {text} --fast-k 301", 3, "fast_k 301"),
        ("{gpt2} {out} --data {text} --lr-schedule step", 2, "choose one of"),
        ("{gpt2} {out} --data {text} --train-path-selection up_only", 3, "unknown --train-path-selection 'up_only'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    line: str, code: int, message: str, tiny_gpt2: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    places = {"gpt2": tiny_gpt2, "out": tmp_path / "out", "text": text, "tmp": tmp_path}
    places |= {"empty": tmp_path / "empty.txt", "latin": tmp_path / "latin.txt"}
    assert main(["train", *line.format(**places).split(), "--max-length", "16"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert code == 2 or sum(text.startswith("Error:") for text in err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom dmpt_export.cli.main import main\nassert main(['train', '--help-all']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Freezing:" in done.stdout


# --- signals and processes ------------------------------------------------------------------------------


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tiny_dmpt: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "dmpt_export", "train", str(tiny_dmpt), str(out), "--data", text, *SMALL]
    process = subprocess.Popen(
        [*line, "--max-steps", "100000"], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    stopped = re.search(r"Error: stopped by SIGINT after step (\d+) of 100000; saved in .*--resume", err)
    assert stopped
    assert "Traceback" not in err
    steps = int(stopped[1])
    assert main(["train", "--out", str(out), "--resume", "--max-steps", str(steps + 1)]) == 0
    assert [record["step"] for record in metrics(out) if "loss" in record] == list(range(1, steps + 2))


def gloo_threads() -> list[str]:
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    return [name for name in names if "gloo" in name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_thread_of_several_processes_is_left_when_python_ends(tiny_dmpt: Path, text: str, tmp_path: Path) -> None:
    """Such a thread aborts a finished run if it frees a tensor while Python shuts down."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    distributed.all_reduce(torch.ones(8))
    assert gloo_threads()
    assert main(["train", str(tiny_dmpt), str(tmp_path / "out"), "--data", text, *SMALL]) == 0
    assert not distributed.is_initialized()
    assert not gloo_threads()


def test_two_processes_do_what_one_does(tiny_dmpt: Path, text: str, tmp_path: Path) -> None:
    """The same global batch, split over two processes that talk through gloo: same losses, step after step."""
    settings = [
        *SMALL, "--dropout", "0", "--max-steps", "5", "--lb-coef", "1", "--head-lb-coef", "1", "--lr", "1e-3",
        "--train-path-selection", "gate_hard", "--eval-data", text,
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", str(tiny_dmpt), str(one), "--data", text, *settings, "--batch-size", "4"]) == 0
    # accelerate's --multi_gpu means "start several processes here"; with our --cpu they talk through gloo
    launch = [sys.executable, *"-m accelerate.commands.launch --multi_gpu --num_processes 2 -m training".split()]
    done = subprocess.run(
        [*launch, str(tiny_dmpt), str(two), "--data", text, *settings],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(metrics(one)) == 6  # five steps and the evaluation
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in ("loss", "nll", "lb", "eval_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=TOLERANCE["float32", "loss"]), (a["step"], key)
