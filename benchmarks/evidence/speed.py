"""Compare the speed of DMPT with GPT-2 and with other runtimes for GPT-2 on a CPU, all in one run.

    python -m benchmarks.evidence.speed --work WORK [--threads 1,2] [--peer-python openvino=/venv/bin/python ...]

Models have GPT-2 small's shape and random weights (benchmarks.evidence.models), are quantized and exported through
the command line, and kept in WORK: a second run starts timing at once. Exports are not checked against torch here
(--no-verify): the weights are random, and the tests check exports of every kind. Installed peers (each optionally in
its own Python) are converted from the same GPT-2 and must predict nearly what Transformers predicts in float32.
Tables go to WORK/speed.md, all samples to WORK/speed-T.json for T threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.evidence import models
from benchmarks.evidence.driver import add_peer_python, dmpt_export, say
from benchmarks.evidence.speed_report import DEEP, GEN, PROMPT, SHALLOW, report
from benchmarks.peers import registry
from benchmarks.speed.cases import Workload
from benchmarks.speed.processes import WorkerFailed
from benchmarks.speed.results import Speed
from benchmarks.speed.timing import Schedule, Target, measure, target
from training.errors import InputError

SCHEMES = {name: ("--scheme", name) for name in ("int8", "int4", "fp16")}  # options of `dmpt-export quantize`
REFERENCE = "transformers fp32"  # the peer that the others are compared with
SCORED = 64  # tokens used to compare them


@dataclass(frozen=True)
class Model:
    """One exported model of the table."""

    name: str
    shape: models.Shape | None = None  # None: plain GPT-2
    fast_k: int = 256
    quantize: tuple[str, ...] = ()  # further options of `dmpt-export quantize`
    onnx: tuple[str, ...] = ()  # and of `dmpt-export onnx`

    @property
    def checkpoint(self) -> str:
        return "gpt2" if self.shape is None else f"dmpt-{self.shape}"

    @property
    def quantized(self) -> str:
        return f"{self.checkpoint}-{'-'.join(self.quantize).replace('*', 'all')}" if self.quantize else self.checkpoint


MODELS = (
    Model("GPT-2"),
    Model("DMPT", models.Shape()),
    Model("DMPT never", models.Shape(switching="never")),
    Model("DMPT always", models.Shape(switching="always")),
    Model("DMPT projected", models.Shape(kind="projected")),
    Model("DMPT one anchor", models.Shape(kind="one-anchor")),
    Model("DMPT one anchor never", models.Shape(kind="one-anchor", switching="never")),
    Model("DMPT one anchor 20 %", models.Shape(kind="one-anchor", switching=0.2)),
    Model("DMPT one anchor 45 %", models.Shape(kind="one-anchor", switching=0.45)),
    Model("DMPT one anchor 20 % K=64", models.Shape(kind="one-anchor", switching=0.2), 64),
    Model("DMPT 16 heads", models.Shape(heads=16)),
    Model("DMPT K=64", models.Shape(), 64),
    Model("DMPT K=1024", models.Shape(), 1024),
    Model("DMPT deltas", models.Shape(), quantize=("--rule", "heads.*=delta-r64")),
    Model("DMPT int8 cache", models.Shape(), onnx=("--kv-cache", "int8")),
)


class Workshop:
    """Makes the models to be timed, once."""

    def __init__(self, work: Path, sizes: dict[str, Any], chosen: Sequence[Model] = ()) -> None:
        self.work, self.chosen = work, chosen or MODELS
        self.sizes = sizes  # smaller than GPT-2 small, for a test
        work.mkdir(parents=True, exist_ok=True)

    def cli(self, *arguments: str | Path) -> None:
        dmpt_export(*arguments, stdout=subprocess.DEVNULL, check=True)

    def checkpoint(self, model: Model) -> Path:
        """The float model; that of a DMPT is only kept until it is quantized."""
        out = self.work / "float" / model.checkpoint
        if not out.is_dir():
            part = out.with_name(f"{out.name}.part")  # an interrupted one is never mistaken for a complete one
            shutil.rmtree(part, ignore_errors=True)
            if model.shape is None:
                models.make_gpt2(part, **self.sizes)
            else:
                models.make_dmpt(part, model.shape, split=self.sizes.get("n_layer", 12) // 2, **self.sizes)
            part.rename(out)
        return out

    def quantized(self, model: Model, scheme: str) -> Path:
        out = self.work / "quantized" / f"{model.quantized}-{scheme}"
        if not out.is_dir():
            self.cli("quantize", self.checkpoint(model), out, *SCHEMES[scheme], *model.quantize)
        return out

    def exported(self, model: Model, scheme: str) -> Target:
        out = self.work / "onnx" / f"{model.name.replace(' ', '_').replace('%', 'pc')}-{scheme}"
        if not out.is_dir():
            say(f"making {model.name} {scheme}")
            fast_k = [] if model.shape is None else ["--fast-k", str(min(model.fast_k, self.vocab_size))]
            self.cli("onnx", self.quantized(model, scheme), out, "--no-verify", *fast_k, *model.onnx)
        return target(f"{model.name} {scheme}", out)

    @property
    def vocab_size(self) -> int:
        return int(self.sizes.get("vocab_size", 50257))

    def ours(self, schemes: list[str]) -> list[Target]:
        """All exported models, one checkpoint after the other; intermediate files are deleted after use."""
        found: dict[tuple[str, str], Target] = {}
        for checkpoint in dict.fromkeys(model.checkpoint for model in self.chosen):
            same = [model for model in self.chosen if model.checkpoint == checkpoint]
            for scheme in schemes:
                found |= {(model.name, scheme): self.exported(model, scheme) for model in same}
                for name in {model.quantized for model in same}:
                    shutil.rmtree(self.work / "quantized" / f"{name}-{scheme}", ignore_errors=True)
            if same[0].shape is not None:
                shutil.rmtree(self.work / "float" / checkpoint, ignore_errors=True)
        return [found[model.name, scheme] for scheme in schemes for model in self.chosen]

    def theirs(self, pythons: dict[str, str]) -> tuple[list[Target], list[str]]:
        """The installed peers; for the others a line on how to install them, or why they failed."""
        found, absent = [], []
        for name, peer in registry.PEERS.items():
            if lacking := registry.missing(name, pythons.get(name)):
                absent.append(f"{name} is not measured: {registry.absence(peer, lacking)}")
                continue
            for scheme in peer.schemes:
                out = self.work / "peers" / f"{name}-{scheme}"
                say(f"preparing {name} {scheme}")
                try:
                    found.append(registry.prepare(name, scheme, self.checkpoint(MODELS[0]), out, pythons.get(name)))
                except WorkerFailed as error:
                    absent.append(f"{name} {scheme} is not measured: {error}")
        return found, absent


def agreement(
    targets: list[Target], vocab_size: int, context: int, work: Path, failed: dict[str, str]
) -> dict[str, dict[str, float]]:
    """How far each runtime of the same GPT-2 is from Transformers in float32, by target name; {} without Transformers.

    failed: filled with the reason of each target that cannot be compared.
    """
    reference = next((t for t in targets if t.name == REFERENCE), None)
    if reference is None:
        return {}
    ids = np.random.default_rng(1).integers(0, vocab_size, min(2 * SCORED, context)).tolist()
    expected = registry.scores(reference, ids, SCORED, work / "scores.npy")
    found = {}
    for t in targets:
        try:
            found[t.name] = dict(registry.divergence(expected, registry.scores(t, ids, SCORED, work / "scores.npy")))
        except WorkerFailed as error:
            failed[t.name] = str(error)
    return found


def run(options: argparse.Namespace, sizes: dict[str, Any]) -> str:
    """Make, check, time; returns the tables."""
    chosen = [model for model in MODELS if not options.models or model.name in options.models.split(",")]
    workshop = Workshop(options.work, sizes, chosen)
    schemes = options.schemes.split(",")
    theirs, absent = workshop.theirs(dict(options.peer_python))
    ours = workshop.ours(schemes)
    say("comparing predictions")
    context = int(sizes.get("n_positions", 1024))
    same = [t for t in ours if t.name.startswith("GPT-2")] + theirs
    failed: dict[str, str] = {}
    agreed = agreement(same, workshop.vocab_size, context, options.work, failed)
    tables = []
    for threads in map(int, options.threads.split(",")):
        prompt, gen, depths = min(PROMPT, context), min(GEN, context // 4), [min(SHALLOW, context // 4), DEEP]
        depths[1] = min(DEEP, context - gen)
        left = [t for t in [*ours, *theirs] if t.name not in failed]
        speeds = measure(
            left, Workload(prompt, gen, depths, fixed_prompt=True, fixed_gen=True, evict=options.evict),
            Schedule(options.repetitions, roof=True), threads, failures=failed,
        )  # fmt: skip
        if broken := [failed[t.name] for t in ours if t.name in failed]:
            raise WorkerFailed(broken[0], 4)  # a peer may fail, ours may not
        missing = [*absent, *(f"{name} is not measured: {why}" for name, why in failed.items())]
        tables.append(report(speeds, agreed, missing))
        write(options.work / f"speed-{threads}.json", speeds, agreed, missing)
    return "\n\n".join(tables) + "\n"


def write(file: Path, speeds: list[Speed], agreed: dict[str, dict[str, float]], absent: list[str]) -> None:
    about = {"machine": machine.machine(), "versions": machine.versions(), "agreement": agreed, "absent": absent}
    rows = [{"name": speed.name, **speed.to_json(speeds[0])} for speed in speeds]
    file.write_text(json.dumps({**about, "models": rows}, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None, sizes: dict[str, Any] | None = None) -> None:
    """sizes: fields of the models' configuration that differ from GPT-2 small's."""
    options = parse(arguments)
    try:
        text = run(options, sizes or {})
    except (WorkerFailed, InputError) as error:
        say(f"Error: {error}")
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:
        say(f"Error: dmpt-export {error.cmd[3]} failed: see its message above")
        sys.exit(error.returncode if error.returncode > 0 else 5)  # below 0: killed, probably because memory ran out
    (options.work / "speed.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--threads", default="1", help="thread counts, one run for each, such as 1,2")
    parser.add_argument("--schemes", default="int8,int4", help=f"of {', '.join(SCHEMES)}")
    parser.add_argument("--repetitions", type=int, default=5, help="measured rounds")
    parser.add_argument("--evict", action="store_true", help="decode also with the weights out of the caches")
    parser.add_argument("--models", default="", help="names of the table's models, such as GPT-2,DMPT; default: all")
    add_peer_python(parser, registry.PEERS)
    options = parser.parse_args(arguments)
    if unknown := set(options.schemes.split(",")) - set(SCHEMES):
        parser.error(f"--schemes {','.join(sorted(unknown))}: known are {', '.join(SCHEMES)}")
    if unknown := set(filter(None, options.models.split(","))) - {model.name for model in MODELS}:
        parser.error(f"--models {','.join(sorted(unknown))}: known are {', '.join(model.name for model in MODELS)}")
    return options


if __name__ == "__main__":
    main()
