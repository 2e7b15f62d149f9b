"""What `dmpt-export train` does with its options (training.cli.parameters). Heavy imports stay inside functions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.checkpoints.atomic import check_inputs, check_run
from training.checkpoints.earlier import RUN, SAVED, recover_earlier, replacing
from training.checkpoints.files import cache_folder, read_json, resolve
from training.checkpoints.folder import float_folder, read_head_allocation, read_shape
from training.cli.recipes import Recipe, read_recipe
from training.errors import InputError
from training.loop.freeze import expanded
from training.loop.options import TrainOptions, read_freeze_schedule
from training.model.shape import ROOT, Shape, check_init
from training.progress import say
from training.text.sources import FIELD, check_source, is_dataset

if TYPE_CHECKING:
    import numpy as np

    from training.loop.trainer import TrainResult
    from training.model.generation import DMPTForCausalLM

PHASE = "phase-{}"  # folder of a recipe's phase, by its number from 1
DEFAULT_TEXTS = {"data": ["wikitext-103"], "eval_data": ["wikitext-103:validation"]}


def run(values: dict[str, Any], explicit: set[str]) -> None:
    """Train. `values` of parameters() by name; `explicit`: those that the user gave."""
    model_name, out = _places(values)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        recover_earlier(out, RUN, SAVED)
    recipe = read_recipe(values["recipe"]) if values["recipe"] else Recipe()
    chosen = {name: values[name] for name in explicit & {field.name for field in fields(TrainOptions)}}
    with _usage():  # a recipe or a saved run may hold what the options need beside them
        alone = values["recipe"] is None and values["resume"] is None
        (TrainOptions.check if alone else TrainOptions.check_each)(TrainOptions(**chosen))
    source = None if values["resume"] is None else _run_folder(Path(values["resume"] or out))
    saved = {} if source is None or len(recipe.phases) > 1 else _saved(source)
    about = _texts(saved.get("about", {"model": model_name}) | _given_texts(values))
    options = [TrainOptions.from_dict(saved.get("options", {}) | phase | chosen, "the run") for phase in recipe.phases]
    if source is None:
        check_run(out, values["overwrite"])
        check_inputs(out, *_inputs(values, model_name, options))
    first = None if len(options) > 1 else source
    tokenizer_from = values["tokenizer"] or (first and str(first)) or model_name
    if first is None and model_name is None and not values["from_scratch"]:
        raise click.UsageError("MODEL is missing: phases of a recipe go on with the same command and --resume")
    if tokenizer_from is None:
        raise click.UsageError("--from-scratch needs --tokenizer FOLDER")
    folder = resolve(tokenizer_from)
    _check(options, first, model_name, folder, values, recipe)

    if os.environ.get("LOCAL_RANK", "0") == "0":
        say("loading PyTorch")
    from accelerate import PartialState

    from training.loop.setup import on_cpu
    from training.loop.trainer import train

    model = _model(first, model_name, folder, values, recipe)
    processes = PartialState(cpu=on_cpu(options[0]))
    with processes.main_process_first():  # it tokenises, the others find the result
        texts = [_tokens(about, key, folder, model, values["cache_dir"]) for key in ("data", "eval_data")]
    tokens, eval_tokens = texts
    assert tokens is not None
    shared: dict[str, Any] = {"tokenizer_from": folder, "about": about, "overwrite": values["overwrite"]}
    if len(options) > 1:
        resume, main = source is not None, processes.is_main_process
        result = _phases(model, tokens, eval_tokens, out, options, resume, main, shared)
    else:
        result = train(model, tokens, options[0], out, eval_tokens, resume=source or False, **shared)
    if processes.is_main_process:
        click.echo(report(result), err=True)


@contextmanager
def _usage() -> Iterator[None]:
    """What is wrong with values of the command line alone is an error of usage."""
    try:
        yield
    except InputError as error:
        raise click.UsageError(str(error)) from error


def _check(
    options: list[TrainOptions],
    source: Path | None,
    name: str | None,
    tokenizer: Path,
    values: dict[str, Any],
    recipe: Recipe,
) -> None:
    """Raise, before torch is imported, for what config.json and the list of files tell already."""
    from training.text.tokenizer import load_tokenizer

    if source is not None:
        shape = read_shape(source)
    elif values["from_scratch"]:
        with _usage():
            Shape.of(_new_sizes(values)).check_exportable()
        load_tokenizer(tokenizer)
        with _usage():
            shape = Shape.of(_new_fields(tokenizer, values))
    else:
        assert name is not None
        shape = read_shape(float_folder(name))
    changes = None if source is not None else _changes(shape, values, recipe)
    if changes is not None:
        shape = check_init(shape, **changes)
    shape.check_exportable()
    for one in options:
        one.check()
        one.check_installed()
        shape = one.check_shape(shape)
        expanded(read_freeze_schedule(one.freeze_schedule), shape)
    load_tokenizer(tokenizer)  # last: a foreign one takes Transformers, and seconds


def _inputs(values: dict[str, Any], model: str | None, options: list[TrainOptions]) -> list[Any]:
    """What a new run reads."""
    names = ("tokenizer", "head_allocation", "recipe", "cache_dir")
    return [
        model, *(values[name] for name in names), *values["data"], *values["eval_data"],
        *(one.freeze_schedule for one in options),
    ]  # fmt: skip


def _places(values: dict[str, Any]) -> tuple[str | None, Path]:
    """(MODEL, OUT), however they were given. Raises UsageError when one is missing."""
    places = [place for place in (values["model_argument"], values["out_argument"]) if place is not None]
    model, out = values["model"], values["out"]
    new = values["from_scratch"] or values["resume"] is not None
    if model is None and places and not (new and out is None and len(places) == 1):
        model = str(places.pop(0))
    if out is None and places:
        out = places.pop(0)
    if places:
        raise click.UsageError(f"'{places[0]}' is too much: MODEL and OUT are already given by --model and --out")
    if out is None and values["resume"]:
        out = _run_of(Path(values["resume"]))
    if out is None:
        raise click.UsageError("OUT is missing: dmpt-export train MODEL OUT --data FILE")
    if model is None and not new:
        raise click.UsageError("MODEL is missing: a GPT-2 or DMPT folder or hub id, or --from-scratch")
    return model, Path(out)


def _given_texts(values: dict[str, Any]) -> dict[str, Any]:
    """The texts of this command line; files by absolute path, so that --resume finds them from anywhere."""
    given: dict[str, Any] = {}
    for key in ("data", "eval_data"):
        if values[key]:
            given[key] = [str(text) if is_dataset(text) else os.path.abspath(text) for text in values[key]]
    return given | ({"text_field": values["text_field"]} if values["text_field"] else {})


def _texts(about: dict[str, Any]) -> dict[str, Any]:
    """`about` with the texts checked, and the original project's where none are given."""
    if not about.get("data"):
        about = about | DEFAULT_TEXTS
        try:
            check_source(about["data"][0])
        except InputError as error:
            raise InputError(f"--data FILE is missing, and the default is not at hand: {error}") from error
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not from every process
            click.echo("No --data given: training on the hub dataset wikitext-103, as the original project", err=True)
    for text in (*about["data"], *about.get("eval_data", ())):
        check_source(text)
    return about


def report(result: TrainResult) -> str:
    """What came out, in two lines."""
    from training.loop.watch import perplexity

    lines = f"{result.folder}: {result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s"
    if result.best_loss is not None:
        lines += f"; held-out perplexity {perplexity(result.best_loss):.2f} (the best model, which is the one in OUT)"
    return f"{lines}\nnext: dmpt-export quantize {result.folder} SMALL --scheme int8"


def _run_of(given: Path) -> Path:
    """The run that --resume names. The original project named a file in it, RUN/checkpoint_epoch_0_step_8200.pt."""
    if given.suffix != ".pt":
        return given
    if given.is_file():
        raise InputError(
            f"cannot resume {given}, a checkpoint of the original project: dmpt-export convert {given} MODEL, then "
            "train MODEL"
        )
    return given.parent


def _run_folder(run: Path) -> Path:
    run = _run_of(run)
    return run / "last" if (run / "last").is_dir() else run


def _saved(source: Path | None) -> dict[str, Any]:
    """state.json of a run to be resumed: its options and data are the defaults."""
    if source is None:
        return {}
    path = source / "trainer_state" / "state.json"
    if not path.is_file():
        raise InputError(f"cannot resume: {source} has no trainer_state; leave --resume out, or give the run's folder")
    return read_json(path)


def _model(
    source: Path | None, name: str | None, tokenizer: Path, values: dict[str, Any], recipe: Recipe
) -> DMPTForCausalLM:
    """The model to start with: resumed, new, or loaded, and made a DMPT when the options say so."""
    import torch

    from training.checkpoints.checkpoint import load_model
    from training.model.config import DMPTConfig
    from training.model.generation import DMPTForCausalLM
    from training.model.init import init_from_gpt2

    if source is not None:
        return load_model(source)
    if values["from_scratch"]:
        torch.manual_seed(values["seed"])
        model = DMPTForCausalLM(DMPTConfig(**_new_fields(tokenizer, values)))
    else:
        assert name is not None
        model = load_model(name)
    changes = _changes(model.config, values, recipe)
    return model if changes is None else init_from_gpt2(model, **changes)


def _new_fields(tokenizer: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a new GPT-2 for a tokenizer."""
    from training.text.tokenizer import load_tokenizer
    from training.text.windows import end_of_text_id

    words = load_tokenizer(tokenizer)
    eot = end_of_text_id(words)
    vocabulary = {"vocab_size": words.get_vocab_size(), "bos_token_id": eot, "eos_token_id": eot}
    return {**vocabulary, **_new_sizes(values), "head_allocation": {ROOT: [0]}}


def _new_sizes(values: dict[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in ("n_layer", "n_embd", "n_head", "n_positions")}


def _changes(start: Shape, values: dict[str, Any], recipe: Recipe) -> dict[str, Any] | None:
    """How the model that training starts with becomes a DMPT, as arguments of init_from_gpt2; None: it stays."""
    shape = recipe.init | {key: values[key] for key in ("splits", "heads", "fast_k") if values[key] is not None}
    if isinstance(shape.get("splits"), str):
        shape["splits"] = _splits(shape["splits"])
    allocation = read_head_allocation(values["head_allocation"]) if values["head_allocation"] else None
    wanted = {"splits", "heads"} & set(shape) or allocation or values["use_head_mixture"] is not None
    plain = not start.splits and start.n_vocab_heads == 1
    if not wanted or not plain:  # a DMPT keeps the shape it has
        return None
    if values["use_head_mixture"] is False:
        allocation, shape["heads"] = None, 2 ** len(shape.get("splits") or [0])
    return {"head_allocation": allocation, "gate_hidden": values["gate_hidden"], **shape}


def _splits(text: str) -> list[int]:
    if text.strip().lower() == "none":
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"--splits {text!r} is no list of block indices such as 6 or 6,9, nor 'none'"
        ) from None


def _tokens(
    about: dict[str, Any], key: str, tokenizer: Path, model: DMPTForCausalLM, cache_dir: Path | None
) -> np.ndarray | None:
    """The tokens of the texts under `key`, tokenised once and kept."""
    from training.text.tokenizer import load_tokenizer
    from training.text.windows import end_of_text_id, token_cache

    if not about.get(key):
        return None
    words = load_tokenizer(tokenizer)
    eot, field = end_of_text_id(words, model.config), about.get("text_field", FIELD)
    return token_cache(about[key], words, eot, cache_dir or cache_folder(), field)


def _phases(
    model: DMPTForCausalLM,
    tokens: np.ndarray,
    eval_tokens: np.ndarray | None,
    out: Path,
    phases: list[TrainOptions],
    resume: bool,
    main: bool,
    shared: dict[str, Any],
) -> TrainResult:
    """Train a recipe's phases, each a run of its own in OUT/phase-N; OUT becomes the last one's model."""
    from training.checkpoints.checkpoint import load_model
    from training.loop import state
    from training.loop.trainer import train

    if new_run := not resume and main:
        out.mkdir(parents=True, exist_ok=True)
    for number, options in enumerate(phases, start=1):
        folder = out / PHASE.format(number)
        started = resume and (folder / "last").is_dir()
        title = f"phase {number} of {len(phases)}"
        new = number == 1 and new_run
        with replacing(out, RUN, SAVED) if new else nullcontext():
            result = train(model, tokens, options, folder, eval_tokens, resume=started, title=title, **shared)
        model = load_model(folder)
    state.publish(folder, out)
    return replace(result, folder=out)
