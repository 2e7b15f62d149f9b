"""Commands of the documents: the original project's with `dmpt-export train` in front, run on a tiny GPT-2 and a
stand-in for the hub; all others are parsed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from dmpt_export.cli.main import VERBS, cli, main
from dmpt_export.cli.train import command
from tests.helpers.fake_hub import FakeDataset, FakeHub
from tests.helpers.paths import REPOSITORY
from training.checkpoints.checkpoint import load_model, read_config
from training.cli.recipes import names, read_recipe
from training.errors import install
from training.loop.options import TrainOptions

# The two commands that train in the original's README, word for word but for `python training.py`.
DUAL = """--pretrained_model gpt2   --split_at_layer 6   --epochs 1   --batch_size 1   --grad_accum_steps 12
    --max_length 256   --max_steps 8200   --train_path_selection gate_soft   --eval_path_selection gate_hard
    --checkpoint_dir checkpoints/dual_path   --head_allocation head_allocation.json   --lb_coef 0.02
    --gold_aux_coef 0.01   --head_lr 3e-6   --gate_lr 2e-6   --use_head_mixture   --head_gate_temp 0.9"""
RESUME = "--resume checkpoints/dual_path/checkpoint_epoch_0_step_120000.pt   --eval_every 500 --save_every 2050"

# Every flag of the original with its default; True: a switch, off by default; Path: takes a file or folder.
FLAGS: dict[str, Any] = {
    "split_at_layer": 6, "max_length": 256, "epochs": 3, "batch_size": 4, "grad_accum_steps": 4, "lr": 2e-5,
    "head_lr": 5e-6, "gate_lr": 1e-5, "weight_decay": 0.01, "warmup_steps": 1000, "max_steps": 0,
    "clip_grad_norm": 1.0, "freeze_head0_steps": 5000, "log_every": 100, "eval_every": 1000, "save_every": 5000,
    "seed": 42, "train_path_selection": "gate_soft", "eval_path_selection": "gate_soft", "lb_coef": 1e-3,
    "gold_aux_coef": 1e-3, "tether_coef": 5e-4, "gate_temp": 1.2, "gate_hidden": 256, "n_lm_perceptrons": 4,
    "head_gate_temp": 1.0, "head_topk": 2, "head_lb_coef": 0.0, "head_entropy_coef": 0.0, "head_only_epochs": 0,
    "use_head_mixture": True, "freeze_all_transformer": True, "freeze_split_gates": True, "head_only_phase": True,
    "checkpoint_dir": Path, "resume": Path, "freeze_schedule": Path, "head_allocation": Path, "init_from_dual": Path,
    "pretrained_model": Path,
}  # fmt: skip
# Not the original's defaults: what is deployed is measured; GPT-2 stays GPT-2 unless splits or heads are asked for;
# temperatures and head_topk are the checkpoint's, which has the original's unless something else was asked for.
OTHER_DEFAULTS = {
    "eval_path_selection": "gate_hard", "splits": None, "heads": None, "gate_temp": None, "head_gate_temp": None,
    "head_topk": None,
}  # fmt: skip
OUR_NAMES = {
    "split_at_layer": "splits", "n_lm_perceptrons": "heads", "checkpoint_dir": "out", "init_from_dual": "model",
    "pretrained_model": "model",
}  # fmt: skip
TINY = "--batch_size 2 --grad_accum_steps 1 --max_length 16 --log_every 1 --max_steps 2 --cpu".split()


def parse(*words: str) -> dict[str, Any]:
    return command.make_context("train", list(words)).params


@pytest.fixture
def workplace(make_gpt2: Callable[..., Any], sample_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to work in: `gpt2` with GPT-2's depth and context, head_allocation.json, a hub with a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_gpt2(tmp_path / "gpt2", n_layer=12, n_embd=16, n_head=2, n_positions=1024)
    (tmp_path / "head_allocation.json").write_text('{\n  "left":  [0, 1, 2, 3],\n  "right": [4, 5, 6, 7]\n}\n')
    rows = [f"{line}\n" for line in sample_text.split("\n")] * 3
    tmp_path.joinpath("text.txt").write_text("".join(rows), encoding="utf-8")
    FakeHub.install(monkeypatch, FakeDataset({"text": rows}))
    return tmp_path


def state_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "last" / "trainer_state" / "state.json").read_text()))


# --- flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["underscores", "dashes"])
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_of_the_original_is_taken_in_both_spellings(flag: str, spelling: str) -> None:
    name = OUR_NAMES.get(flag, flag)
    word = f"--{flag.replace('_', '-') if spelling == 'dashes' else flag}"
    value = FLAGS[flag]
    if value is True:
        assert parse(word)[name] is True
        assert parse()[name] in (False, None)
        return
    given = "somewhere" if value is Path else str(value)
    assert str(parse(word, given)[name]) == (f"[{given}]" if name == "splits" else given)
    assert parse()[name] == OTHER_DEFAULTS.get(name, None if value is Path else value)


def test_a_checkpoint_starts_with_the_originals_temperatures(workplace: Path) -> None:
    assert main(["init", "gpt2", "dmpt", "--splits", "6"]) == 0
    config = read_config(workplace / "dmpt")
    assert (config.gate_temp, config.head_gate_temp, config.head_topk) == (1.2, 1.0, None)
    assert config.gate_hidden == 256


def test_every_option_of_the_trainer_is_an_option_of_the_command() -> None:
    options = {field.name: field.default for field in fields(TrainOptions)}
    assert {name: parse()[name] for name in options} == options
    spelled = {name for parameter in command.get_params(click.Context(command)) for name in parameter.opts}
    assert not {name for name in spelled if "_" in name and name.startswith("--")}  # one spelling in the help


# --- the README's commands ------------------------------------------------------------------------------


def test_the_originals_command_means_what_it_says(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    """As written, nothing added: no --data, so the original's text; every value arrives at the trainer."""
    seen: dict[str, Any] = {}

    class Stop(Exception):
        exit_code = 77

    def train(model: Any, tokens: Any, options: TrainOptions, out: Path, eval_tokens: Any, **more: Any) -> None:
        seen.update(model=model, options=options, out=out, tokens=tokens, eval_tokens=eval_tokens)
        seen["about"] = more["extras"].about
        raise Stop

    monkeypatch.setattr("training.loop.trainer.train", train)
    assert main(["train", *shlex.split(DUAL)]) == 77
    expected = TrainOptions(
        epochs=1, batch_size=1, grad_accum_steps=12, max_length=256, max_steps=8200, train_path_selection="gate_soft",
        eval_path_selection="gate_hard", lb_coef=0.02, gold_aux_coef=0.01, head_lr=3e-6, gate_lr=2e-6,
        head_gate_temp=0.9,
    )  # fmt: skip
    assert seen["options"] == expected
    assert seen["out"] == Path("checkpoints/dual_path")
    assert seen["about"] == {"model": "gpt2", "data": ["wikitext-103"], "eval_data": ["wikitext-103:validation"]}
    assert len(seen["tokens"]) == len(seen["eval_tokens"]) > 256
    config = seen["model"].config
    assert (config.splits, config.head_allocation) == ([6], {"left": [0, 1, 2, 3], "right": [4, 5, 6, 7]})


def test_the_originals_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, be interrupted, resume by the original's kind of file name; later options win, so the run is short."""
    from training.loop.trainer import Trainer

    run = workplace / "checkpoints" / "dual_path"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "agreed", lambda self, stop: "SIGTERM")
        assert main(["train", *shlex.split(DUAL), *TINY]) == 130
    assert state_of(run)["step"] == 1
    assert main(["train", *shlex.split(RESUME)]) == 0
    state = state_of(run)
    assert (state["step"], state["finished"]) == (2, True)
    assert (state["options"]["eval_every"], state["options"]["save_every"]) == (500, 2050)
    assert (state["options"]["lb_coef"], state["options"]["gate_lr"]) == (0.02, 2e-6)  # from the first command
    config = read_config(run)
    assert (config.splits, config.head_gate_temp) == ([6], 0.9)
    assert load_model(run).config.n_vocab_heads == 8


def test_resuming_the_originals_own_checkpoint_says_to_convert_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "old.pt").write_bytes(b"PK")
    assert main(["train", "--resume", "old.pt"]) == 3
    assert "dmpt-export convert old.pt MODEL" in capsys.readouterr().err
    assert main(["train", "--resume", "none/checkpoint_step_8000.pt"]) == 3
    assert "cannot resume: none has no trainer_state" in capsys.readouterr().err


def test_without_data_and_without_a_hub_one_line_says_so(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.text.sources.find_spec", lambda name: None)
    assert main(["train", str(tiny_gpt2), "out"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("Error: --data FILE is missing")
    assert err.endswith(f"{install('data')}\n")
    assert err.count("\n") == 1
    assert not Path("out").exists()


# --- recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", names())
def test_recipes_train_all_their_phases(recipe: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workplace / "out"
    data = ["--data", "text.txt", "--eval-data", "text.txt", "--eval_length", "64", "--eval_max_tokens", "200"]
    assert main(["train", "gpt2", str(out), "--recipe", recipe, *data, *TINY, "--max_steps", "1", "--fast_k", "8"]) == 0
    written = read_recipe(recipe)
    runs = [out / f"phase-{n}" for n in range(1, 1 + len(written.phases))] if len(written.phases) > 1 else [out]
    assert sorted(out.glob("phase-*")) == (runs if runs != [out] else [])
    for run, phase in zip(runs, written.phases, strict=True):
        options = state_of(run)["options"]
        short = {"batch_size": 2, "grad_accum_steps": 1, "max_length": 16, "max_steps": 1}
        assert {name: options[name] for name in phase} == phase | {k: v for k, v in short.items() if k in phase}
    config = read_config(out)
    half = [config.n_layer // 2]
    assert (config.splits, config.n_vocab_heads) == (written.init.get("splits", half), written.init["heads"])
    model, last = load_model(out), load_model(runs[-1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), last.parameters(), strict=True))
    capsys.readouterr()
    assert main(["eval", str(out), "--data", "text.txt", "--max-length", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] > 1
    assert len(result["route_shares"]) == 2 ** len(config.splits)


def test_the_last_phase_of_the_dual_recipe_polishes_the_right_path_alone(workplace: Path) -> None:
    """What the original froze there: the left path, both kinds of gates, and head 0."""
    out = workplace / "out"
    line = ["train", "gpt2", str(out), "--recipe", "dual-multi-head", "--data", "text.txt", *TINY]
    assert main([*line, "--warmup_steps", "0", "--max_steps", "1", "--dropout", "0"]) == 0
    before, after = (load_model(out / f"phase-{n}").state_dict() for n in (3, 4))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert not {n for n in changed if n.startswith(("paths.left", "gates", "head_gates", "heads.0"))}
    assert any(name.startswith("paths.right") for name in changed)


# --- README and guides --------------------------------------------------------------------------------

GUIDES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMAND = rf"dmpt-export (?:{'|'.join(VERBS)}) "
WHOLE = re.compile(rf"^(?:    )?(?:.*\| )?({COMMAND}.*)$", re.MULTILINE)
INLINE = re.compile(rf"(?<!`)`({COMMAND}[^`]*)`(?!`)")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.")  # `dmpt-export quantize OUT ...` shows a form


def commands_of(text: str) -> list[list[str]]:
    """Every complete command of a document, as words, without what the shell takes."""
    lines = [*WHOLE.findall(text), *(line for line in INLINE.findall(text) if not PLACEHOLDER.search(line))]
    return [shlex.split(re.split(r" [<>] | \| ", line)[0], comments=True)[1:] for line in lines]


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_the_commands_of_documents_are_complete_commands(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments, options and their values are those of the verb; nothing runs."""
    monkeypatch.chdir(tmp_path)
    for verb, *words in commands_of(document.read_text(encoding="utf-8")):
        parsed = cli.get_command(click.Context(cli), verb)
        assert parsed is not None
        try:
            with parsed.make_context(verb, words):
                pass
        except click.UsageError as error:
            pytest.fail(f"{document.name}: dmpt-export {shlex.join([verb, *words])}: {error.format_message()}")
        except click.exceptions.Exit:  # --help
            continue


def test_commands_are_found_in_documents() -> None:
    text = (
        "    dmpt-export run device 'a b' # note\n    echo x | dmpt-export run device --json\nor `dmpt-export init a b`"
    )
    assert commands_of(text) == [["run", "device", "a b"], ["run", "device", "--json"], ["init", "a", "b"]]
    without = {guide.name for guide in GUIDES if not commands_of(guide.read_text(encoding="utf-8"))}
    assert without <= {"contributing.md", "design.md"}
