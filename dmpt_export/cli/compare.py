"""`dmpt-export compare`: models side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.cli.checks import check_model, is_exported, usage
from dmpt_export.cli.eval import PROTOCOLS, check_request, check_scored
from dmpt_export.cli.extras import require

if TYPE_CHECKING:
    from benchmarks.comparison.contestants import Entry
    from benchmarks.comparison.result import Comparison


@click.command("compare", short_help="Put models side by side: size, quality, speed.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", multiple=True, type=click.Path(dir_okay=False), metavar="FILE",
              help="Text to score, as in eval. Without it only sizes and speeds are compared.")  # fmt: skip
@click.option("--text-field", default="text", show_default=True, metavar="NAME",
              help="Where the text is in JSONL, Parquet and datasets.")  # fmt: skip
@click.option("--protocol", type=click.Choice(PROTOCOLS), default=PROTOCOLS[0], show_default=True,
              help="What is scored after what, as in eval.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False),
              help="Folder for report.html and comparison.json, .md, .csv and .png.")  # fmt: skip
@click.option("--control", multiple=True, metavar="NAME",
              help="A row that is plain GPT-2 fine-tuned on the same tokens as the DMPT rows.")  # fmt: skip
@click.option("--peers", metavar="GPT2",
              help="Also every peer that is installed, on this GPT-2 folder or hub id.")  # fmt: skip
@click.option("--peer-python", multiple=True, metavar="PEER=PYTHON",
              help="The interpreter that holds a peer, where it is not this one.")  # fmt: skip
@click.option("--growth", multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="What `bench --json` printed, to be drawn in the report's growth curves.")  # fmt: skip
@click.option("--resume", type=click.Path(file_okay=False), metavar="FOLDER",
              help="Keep converted peers and scores there: a killed comparison, run again, goes on, and one with more "
              "models measures only those anew. Speed is always timed again, all in one schedule.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2), metavar="N",
              help="Tokens in a window. Default: 1024, or the smallest context if that is less.")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), metavar="N",
              help="Predictions scored in each window. Default: half a window.")  # fmt: skip
@click.option(
    "--prompt",
    default=128,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens fed at once; this and --gen shrink to the smallest context.",
)
@click.option("--gen", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens decoded after them.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all this process may use.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def command(
    models: tuple[str, ...],
    data: tuple[str, ...],
    out: str | None,
    control: tuple[str, ...],
    peers: str | None,
    peer_python: tuple[str, ...],
    growth: tuple[str, ...],
    text_field: str,
    protocol: str,
    resume: str | None,
    max_length: int | None,
    stride: int | None,
    prompt: int,
    gen: int,
    repetitions: int,
    threads: int | None,
    device: str,
) -> None:
    """Compare any mix of models: GPT-2 folders or hub ids, DMPT and quantized folders, ONNX folders, peers.

    NAME=MODEL gives a model another name. All are scored on the same text in the same windows; ONNX folders and peers
    are timed in one interleaved schedule, each in a process of its own; checkpoints have no speed (-). Where tokenizers
    differ, perplexity per word and bits per byte stand in for what is per token.
    Whether DMPT gains anything can only be said beside a GPT-2 that was fine-tuned on the same tokens: mark it
    with --control.

    A peer is another runtime that runs a plain GPT-2, given as PEER:SCHEME@GPT2: transformers:fp32 :bf16,
    optimum:fp32 :int8, openvino:int8 :int4, llama.cpp:q8_0 :q4_0, ctranslate2:fp32 :int8, bitsandbytes:int8 :nf4.
    --peers GPT2 takes all that are installed; for the others the command that installs them is listed. A model that
    fails is a row that says why, and the rest goes on; if it is none of the peers, the exit code is 4.

    \b
    Examples:
      dmpt-export compare tuned=gpt2-device device --control tuned --data wiki.test.raw --out report
      dmpt-export compare gpt2-device device openvino:int8@./gpt2 --data wiki.test.raw --out report
      dmpt-export compare gpt2-device device --peers ./gpt2 --peer-python openvino=/venv/bin/python --out report
    """
    exported = [is_exported(model.partition("=")[2] or model) for model in models]
    needs_torch = not all(exported) or peers is not None or out is not None
    wanted = {device: any(exported), "train": needs_torch, "bench": bool(out and data)}
    require(*(extra for extra, needed in wanted.items() if needed))
    from training.checkpoints.atomic import check_inputs, check_replaceable
    from training.errors import ValidationError
    from training.progress import say

    pythons, named = interpreters(peer_python), entries_of(models, control)
    if out is not None:
        check_replaceable(Path(out), "comparison")
        check_inputs(Path(out), *(entry.path for entry in named), peers, *data, resume, *growth)
    check_request(data, protocol, max_length, stride, [resume] if resume else [])
    sources = list(dict.fromkeys([*(entry.path for entry in named), *([peers] if peers else [])]))
    for source in sources:  # before tokenizers: that of a foreign folder takes Transformers, and seconds
        if not is_exported(source):
            check_model(source)
    for source in sources:
        check_scored(source, max_length, stride, protocol)
    if needs_torch:
        say("loading PyTorch")
    from benchmarks.comparison.comparison import compare
    from benchmarks.comparison.contestants import Settings

    entries, absent = with_peers(named, peers, pythons)
    settings = Settings(
        threads, device, protocol, max_length, stride, text_field, prompt, gen, repetitions, resume, pythons
    )
    drawn = [row for file in growth for row in bench_rows(file)]
    result = compare(entries, data, out, settings, absent=absent, growth=drawn, show=show)
    if out is None:
        click.echo("Add --out DIR to keep this, with a report of figures.", err=True)
    else:
        more_data = "" if data else "; with --data it would also compare quality"
        click.echo(f"Written to {out}: open {Path(out) / 'report.html'}{more_data}", err=True)
    if result.failed:
        raise ValidationError(f"{', '.join(result.failed)} could not be measured: the table says why")


def with_peers(entries: list[Entry], source: str | None, pythons: dict[str, str]) -> tuple[list[Entry], list[str]]:
    """The entries, then all peers that are here on the GPT-2 `source`; and lines about those that are not."""
    from benchmarks.comparison.contestants import peers_of

    asked = {entry.peer for entry in entries if entry.peer}
    found, absent = peers_of(source, pythons, asked)
    if source or asked:
        known = {(entry.peer, entry.scheme, entry.path) for entry in entries}
        return [*entries, *(entry for entry in found if (entry.peer, entry.scheme, entry.path) not in known)], absent
    here = "No other runtime was asked for: --peers GPT2 measures those that are installed."
    return entries, [here, *absent]


def show(result: Comparison) -> None:
    """On the terminal; before it is written, so that a full disk does not take it away."""
    click.echo("\n".join([result.table(), "", result.reading, *result.notes(), result.conditions()]))


def entries_of(models: tuple[str, ...], control: tuple[str, ...]) -> list[Entry]:
    """What the arguments name. Raises UsageError for a control that is none of them."""
    from benchmarks.comparison.contestants import Entry
    from benchmarks.peers.registry import parse
    from benchmarks.quality.scorer import named

    entries = []
    for name, path in named(models):
        with usage():
            peer = parse(path)
        if peer:
            kind, scheme, source = peer
            called = f"{kind} {scheme}" if name in (path, Path(path).name) else name
            entries.append(Entry(called, source, scheme=scheme, peer=kind))
        else:
            entries.append(Entry(name, path, control=name in control))
    if unknown := set(control) - {entry.name for entry in entries if entry.peer is None}:
        names = ", ".join(entry.name for entry in entries if entry.peer is None)
        raise click.UsageError(f"--control {', '.join(sorted(unknown))} names no model here; these are: {names}")
    return entries


def interpreters(pairs: tuple[str, ...]) -> dict[str, str]:
    """PEER=PYTHON ... as a dict. Raises UsageError for what is no such pair."""
    from benchmarks.peers.registry import PEERS

    out = {}
    for pair in pairs:
        name, equals, python = pair.partition("=")
        if not (equals and python) or name not in PEERS:
            raise click.UsageError(f"--peer-python {pair}: give PEER=PYTHON with one of {', '.join(PEERS)}")
        out[name] = python
    return out


def bench_rows(file: str) -> list[dict[str, Any]]:
    """The models of a file that `bench --json` wrote. Raises BadParameter for another file."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = found.get("models", [found])
        if not all({"name", "threads", "scheme", "shape", "tests"} <= row.keys() for row in rows):
            raise ValueError
    except (OSError, ValueError, AttributeError) as error:
        raise click.BadParameter(f"{file} is not what `dmpt-export bench --json` prints") from error
    return rows
