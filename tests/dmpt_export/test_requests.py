"""Requests and commands have the same fields and defaults, and errors name fields or flags accordingly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from dmpt_export.cli.main import cli, main
from dmpt_export.requests.bench import BenchRequest
from dmpt_export.requests.card import CardRequest
from dmpt_export.requests.check import CheckRequest
from dmpt_export.requests.compare import CompareRequest
from dmpt_export.requests.convert import ConvertRequest
from dmpt_export.requests.eval import EvaluateRequest
from dmpt_export.requests.init import InitRequest
from dmpt_export.requests.inspect import InspectRequest
from dmpt_export.requests.onnx import ExportRequest
from dmpt_export.requests.page import PageRequest
from dmpt_export.requests.quantize import QuantizeRequest
from dmpt_export.requests.run import RunRequest
from dmpt_export.requests.serve import ServeRequest
from tests.helpers.paths import REPOSITORY
from training.cli.command import request_of
from training.cli.request import TrainRequest
from training.errors import FieldError, OptionError
from training.loop.options import TrainOptions

# Verb -> request of its shortest command line
LEAST: dict[str, tuple[list[str], Any]] = {
    "init": (["m", "o"], InitRequest("m", Path("o"))),
    "train": (["m", "o"], TrainRequest("m", Path("o"))),
    "quantize": (["m"], QuantizeRequest("m")),
    "onnx": (["m", "o"], ExportRequest("m", "o")),
    "check": (["m"], CheckRequest("m")),
    "run": (["m"], RunRequest("m")),
    "serve": (["m"], ServeRequest("m")),
    "eval": (["m", "--data", "t"], EvaluateRequest("m", ("t",))),
    "inspect": (["m"], InspectRequest("m")),
    "bench": (["m", "n"], BenchRequest(("m", "n"))),
    "compare": (["m", "n"], CompareRequest(("m", "n"))),
    "card": (["m", "c"], CardRequest("m", "c")),
    "page": (["m", "o"], PageRequest("m", "o")),
    "convert": (["m", "o"], ConvertRequest("m", Path("o"))),
}
SHOWN = {"as_json", "echo", "form", "full", "tensors", "verbose"}  # how a result is printed
PLACES = {"model_argument", "out_argument"}  # of train, which takes model and out in two ways
PACKAGES = ("benchmarks", "dmpt_export", "quant", "training")
ERRORS = ("FieldError", "OptionError")


def command_of(verb: str) -> click.Command:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return command


def context_of(verb: str) -> click.Context:
    return command_of(verb).make_context(verb, [*LEAST[verb][0]])


def names(request: Any) -> set[str]:
    """All fields of a request; train's options are fields, too."""
    own = {field.name for field in fields(request)}
    if isinstance(request, TrainRequest):
        return own - {"options", "given"} | {field.name for field in fields(TrainOptions)}
    return own


@pytest.mark.parametrize("verb", LEAST)
def test_fields_are_parameters(verb: str) -> None:
    context = context_of(verb)
    assert names(LEAST[verb][1]) == set(context.params) - SHOWN - PLACES


@pytest.mark.parametrize("verb", LEAST)
def test_defaults_are_the_same(verb: str) -> None:
    context = context_of(verb)
    if verb == "train":
        assert request_of(context) == replace(LEAST[verb][1], given=frozenset())
        return
    values = {name: value for name, value in context.params.items() if name not in SHOWN}
    assert type(LEAST[verb][1])(**values) == LEAST[verb][1]


@pytest.mark.parametrize("verb", LEAST)
def test_requests_import_nothing_heavy(verb: str) -> None:
    module = "training.cli.request" if verb == "train" else f"dmpt_export.requests.{verb}"
    assert type(LEAST[verb][1]).__module__ == module
    heavy = ("torch", "transformers", "accelerate", "safetensors", "onnx", "onnx_ir", "onnxruntime", "click")
    if verb == "train":  # it lies beside the command, which accelerate launches
        heavy = heavy[:-1]
    code = f"import sys, {module}\nassert not set({heavy!r}) & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- errors -----------------------------------------------------------------------------------------


def raised() -> Iterator[tuple[str, str, int]]:
    """(where, message, number of values) of every FieldError and OptionError in the packages."""
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                call = node.func if isinstance(node, ast.Call) else None
                if not (isinstance(node, ast.Call) and isinstance(call, ast.Name) and call.id in ERRORS):
                    continue
                message = node.args[0]
                if isinstance(message, ast.Constant | ast.JoinedStr):
                    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "?" for part in parts)
                    yield f"{file.relative_to(REPOSITORY)}:{node.lineno}", text, len(node.args) - 1


def test_errors_name_fields() -> None:
    known = set().union(*(names(request) for _, request in LEAST.values()))
    found = list(raised())
    assert len(found) > 50
    named = [(where, name) for where, text, _ in found for name in re.findall(r"\{(\w+)\}", text)]
    assert not [(where, name) for where, name in named if name not in known]
    assert not [(where, text) for where, text, values in found if text.count("{}") != values]


def test_no_error_names_flags() -> None:
    for where, text, _ in raised():
        assert "--" not in text.partition("dmpt-export")[0], f"{where} names an option of the command line"


def test_braces_of_users_do_no_harm() -> None:
    error = OptionError("{candidates} '{}' is no {calib}", "{calib}{0}{}")
    assert str(error) == "candidates '{calib}{0}{}' is no calib"
    assert error.with_flags({"calib": "--calib"}) == "candidates '{calib}{0}{}' is no --calib"
    assert str(error.after("{x}: ")) == "{x}: candidates '{calib}{0}{}' is no calib"
    assert type(error.after("")) is OptionError
    assert FieldError.exit_code == 3
    assert OptionError.exit_code == 2


def test_the_command_line_has_its_own_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["quantize", "in"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Usage: dmpt-export quantize [OPTIONS] CHECKPOINT [OUT]\n")
    assert "Try 'dmpt-export quantize -" in err
    assert "Error: Missing argument 'OUT': the folder" in err
    assert main(["quantize", "in", "out", "--target-kl", "1", "--rule", "*=int8"]) == 2
    assert "leave out --rule, or limit its choice with --candidates" in capsys.readouterr().err
    (tmp_path / "run" / "last").mkdir(parents=True)
    assert main(["train", "in", str(tmp_path / "run"), "--data", __file__]) == 3
    assert "continue it with --resume, or replace it with --overwrite\n" in capsys.readouterr().err
    with pytest.raises(OptionError, match="leave out asymmetric, or limit its choice with candidates"):
        QuantizeRequest("in", "out", asymmetric=True, target_bits=4, calib="text").check()


def test_options_of_a_training_request_win() -> None:
    assert TrainRequest("m", Path("o"), options=TrainOptions(lr=1.0)).chosen() == {"lr": 1.0}
    assert TrainRequest("m", Path("o"), given=frozenset({"seed"})).chosen() == {"seed": TrainOptions.seed}
    assert request_of(command_of("train").make_context("train", ["m", "o", "--seed", "42"])).chosen() == {"seed": 42}


def test_every_request_is_tried() -> None:
    here = {path.stem for path in (REPOSITORY / "dmpt_export" / "requests").glob("*.py")}
    own = [import_module(f"dmpt_export.requests.{name}") for name in sorted(here - {"__init__"})]
    classes = {value.__name__ for module in own for value in vars(module).values() if isinstance(value, type)}
    tried = {type(request).__name__ for _, request in LEAST.values()} - {"TrainRequest"}
    assert {name for name in classes if name.endswith("Request")} == tried
