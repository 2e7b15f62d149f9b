"""What does quantizing cost? Every scheme, every planned size, and for plain GPT-2 what other tools make of it.

    python -m benchmarks.evidence.quantization --work WORK --model gpt2=DIR --model dual=DIR \
        --calib tune.txt --text test.txt [--tokens 40000] [--sizes 1.5MB,1MB] \
        [--also 'int4 deltas=--scheme int4 --rule heads.*=delta-r64'] [--peer-python openvino=/venv/bin/python ...]

Models are quantized and exported through the command line; calibrated schemes and plans see the calibration text
alone. Each result is held against the float checkpoint in torch on the windows of benchmarks.quality (its log-probs
are kept in WORK/reference). Peers get the same weights, each perhaps in a Python of its own. Every measurement is a
line of WORK/results.jsonl and is skipped when the command is given again; the table goes to WORK/quantization.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import peers, quality, scorer
from benchmarks.adapters import FACTS
from benchmarks.evidence.quantization_report import Divergence, divergence, log, table
from benchmarks.peers import Peer
from benchmarks.processes import WorkerFailed, worker
from training import data
from training.errors import InputError, ValidationError

Float = NDArray[np.float32]
Score = Callable[[NDArray[np.integer], int], Float]  # ids [S], last -> log-probs [last, V]
FLOAT = "float32"  # the variant that is exported as it is
SCHEMES = ("fp16", "int8", "bnb-int8", "int8-dynamic", "int4", "int4-hqq", "int4-gptq", "nf4", "fp4", "int3",
           "int3-gptq", "int2", "int2-gptq")  # fmt: skip
CALIBRATED = {scheme for scheme in SCHEMES if scheme.endswith("-gptq")}
ORT = Peer(
    "benchmarks.adapters.ort_quantizers",
    ("dynamic", "rtn-8", "rtn-4", "hqq-4", "kquant-4"),
    ("optimum-onnx", "onnxruntime", "accelerate", "onnx-ir"),
    "pip install 'optimum-onnx[onnxruntime]' accelerate onnx-ir",
)


def all_peers() -> dict[str, Peer]:
    """Every peer that has quantized weights."""
    return {**peers.PEERS, "onnxruntime": ORT}


def variants(calib: Path, sizes: list[str], also: list[str]) -> dict[str, list[str]]:
    """Name -> options of `dmpt-export quantize`: all registered schemes, planned sizes, and NAME=OPTIONS given."""
    found: dict[str, list[str]] = {FLOAT: []}
    text = ["--calib", str(calib)]
    for scheme in SCHEMES:
        found[scheme] = ["--scheme", scheme, *(text if scheme in CALIBRATED else [])]
    for size in sizes:
        found[f"planned {size}"] = ["--target-size", size, *text]
    for pair in also:
        name, _, options = pair.partition("=")
        found[name] = [str(calib) if word == "CALIB" else word for word in shlex.split(options)]
    return found


class Evidence:
    """Everything that one work folder holds."""

    def __init__(self, work: Path, text: Path, tokens: int, threads: int) -> None:
        self.work, self.text, self.tokens, self.threads = work, text, tokens, threads
        work.mkdir(parents=True, exist_ok=True)
        self.lines = work / "results.jsonl"
        self.absent: list[str] = []

    def cli(self, *arguments: str | Path) -> None:
        """Run a verb of dmpt-export; InputError with its last line when it fails."""
        command = [sys.executable, "-m", "dmpt_export", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise InputError(said[-1].removeprefix("Error: "))

    def done(self) -> list[dict[str, Any]]:
        if not self.lines.is_file():
            return []
        return [json.loads(line) for line in self.lines.read_text(encoding="utf-8").splitlines()]

    def key(self, model: str, name: str) -> dict[str, Any]:
        return {"model": model, "name": name, "tokens_asked": self.tokens, "text": self.text.name}

    def has(self, model: str, name: str) -> bool:
        key = self.key(model, name)
        return any(key.items() <= line.items() for line in self.done())

    def add(self, model: str, name: str, found: Divergence, **facts: Any) -> None:
        with open(self.lines, "a", encoding="utf-8") as out:
            out.write(json.dumps(self.key(model, name) | asdict(found) | facts, allow_nan=False) + "\n")

    # --- the reference ----------------------------------------------------------------------------

    def reference(self, model: str, source: Path) -> Reference:
        """The float checkpoint's log-probs of all windows, computed once."""
        file = self.work / "reference" / f"{model}-{self.text.stem}-{self.tokens}.npy"
        opened = scorer.open_scorer(source, self.threads)
        try:
            ids = quality.read_tokens(opened, [self.text])[: self.tokens]
            length, step = quality.choose_windows(opened.context, None, None)
            windows = list(data.windows(len(ids), length, step))
            total = sum(n for _, _, n in windows)
            if not file.is_file():
                say(f"{model}: the float model on {total} tokens")
                file.parent.mkdir(exist_ok=True)
                part = file.with_suffix(".part")
                out = np.lib.format.open_memmap(part, "w+", np.float32, (total, opened.vocab_size))
                for place, start, stop, n in placed(windows):
                    out[place : place + n] = opened.score(ids[start : stop - 1], n)[0]
                out.flush()
                del out
                part.rename(file)
        finally:
            opened.close()
        return Reference(ids, windows, np.load(file, mmap_mode="r", allow_pickle=False))

    # --- ours -------------------------------------------------------------------------------------

    def ours(self, model: str, source: Path, name: str, options: list[str]) -> None:
        """Quantize, export, score; what is made lies in WORK/made until it is measured."""
        if self.has(model, name):
            return
        say(f"{model}: {name}")
        made = self.work / "made"
        shutil.rmtree(made, ignore_errors=True)
        started = time.monotonic()
        try:
            if options:
                self.cli("quantize", source, made / "quantized", *options)
            seconds = time.monotonic() - started
            folder = made / "quantized" if options else source
            self.cli("onnx", folder, made / "onnx")
            opened = scorer.open_scorer(made / "onnx", self.threads)
            try:
                found = self.reference(model, source).against(lambda ids, last: opened.score(ids, last)[0], name)
            finally:
                opened.close()
        except (InputError, ValidationError) as error:
            self.absent.append(f"{model} {name} is not measured: {error}")
            return
        sizes = {"onnx_bytes": scorer.onnx_size(made / "onnx"), "weights_bytes": weights_bytes(folder)}
        self.add(model, name, found, **sizes, seconds=round(seconds, 1), peer=False)
        shutil.rmtree(made)

    # --- peers ------------------------------------------------------------------------------------

    def theirs(self, model: str, source: Path, pythons: dict[str, str]) -> None:
        """All peers that are there; for the others the line that says how to get them, or why it failed."""
        for name, peer in all_peers().items():
            wanted = [scheme for scheme in peer.schemes if not self.has(model, f"{name} {scheme}")]
            if not wanted:
                continue
            with worker(name, pythons.get(name)) as w:
                found = w.ask(do="versions", packages=list(peer.packages))
            if lacking := [package for package in peer.packages if found[package] is None]:
                self.absent.append(f"{name} is not measured: it lacks {', '.join(lacking)}; {peer.install}")
                continue
            for scheme in wanted:
                say(f"{model}: {name} {scheme}")
                try:
                    self.peer(model, source, name, scheme, peer, pythons.get(name))
                except (WorkerFailed, ValidationError) as error:
                    self.absent.append(f"{name} {scheme} is not measured: {error}")

    def peer(self, model: str, source: Path, name: str, scheme: str, peer: Peer, python: str | None) -> None:
        """Convert in one process, score in another: as a user would."""
        out, rows = self.work / "peer", self.work / "rows.npy"
        shutil.rmtree(out, ignore_errors=True)
        plain = peers.gpt2_folder(source, self.work / "gpt2" / model)
        with worker(f"{name} {scheme}", python) as w:
            facts = w.ask(do="convert", adapter=peer.adapter, source=str(plain.resolve()), out=str(out), scheme=scheme)
        (out / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        with worker(f"{name} {scheme}", python) as w:
            w.ask(do="load", adapter=peer.adapter, path=str(out), threads=self.threads, device="cpu")

            def score(ids: NDArray[np.integer], last: int) -> Float:
                w.ask(do="score", ids=ids.tolist(), last=last, out=str(rows))
                scores: Float = np.load(rows, allow_pickle=False)
                return scores

            found = self.reference(model, source).against(score, name)
        self.add(model, f"{name} {scheme}", found, onnx_bytes=int(facts["size_bytes"]), peer=True, facts=facts)
        shutil.rmtree(out)


class Reference:
    """What the float model says about a text."""

    def __init__(self, ids: NDArray[np.int32], windows: list[tuple[int, int, int]], log_probs: Float) -> None:
        self.ids, self.windows, self.log_probs = ids, windows, log_probs

    def against(self, score: Score, name: str) -> Divergence:
        """How far another model is from it, over all windows. Raises ValidationError for what is not finite."""
        parts = []
        for place, start, stop, n in placed(self.windows):
            got = score(self.ids[start : stop - 1], n)
            parts.append(log(self.log_probs[place : place + n], got, self.ids[stop - n : stop], name))
        return divergence(parts)


def placed(windows: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """(rows before it, start, stop, scored) of each window."""
    place = 0
    for start, stop, n in windows:
        yield place, start, stop, n
        place += n


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in scorer.weight_files(folder))


def is_plain(source: Path) -> bool:
    """Whether the checkpoint is GPT-2's network, which is all that peers run."""
    from training.checkpoint import read_config

    config = read_config(source)
    return not config.splits and config.n_vocab_heads == 1


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    evidence = Evidence(options.work, options.text, options.tokens, options.threads)
    models = {name: Path(path) for name, path in (pair.split("=", 1) for pair in options.model)}
    known = variants(options.calib, options.sizes.split(",") if options.sizes else [], options.also)
    names = options.variants.split(",") if options.variants else list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown variants: {', '.join(unknown)}; known: {', '.join(known)}")
    pythons = dict(pair.split("=", 1) for pair in options.peer_python)
    try:
        for model, source in models.items():
            for name in names:
                evidence.ours(model, source, name, known[name])
            if options.peers and is_plain(source):
                evidence.theirs(model, source, pythons)
    except (InputError, WorkerFailed) as error:
        say(f"Error: {error}")
        sys.exit(error.exit_code)
    finally:
        text = table(evidence.done(), evidence.absent)
        (options.work / "quantization.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="a float checkpoint")
    parser.add_argument("--calib", type=Path, required=True, help="text that calibrated schemes and plans may see")
    parser.add_argument("--text", type=Path, required=True, help="text that results are measured on")
    parser.add_argument("--tokens", type=int, default=40_000, help="how much of it, from its beginning")
    parser.add_argument("--variants", default="", help="some of the schemes and others below, comma-separated")
    parser.add_argument("--sizes", default="", help="sizes to plan for, like 1.5MB,1MB")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=OPTIONS",
                        help="another way: options of dmpt-export quantize, CALIB for the text")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", action="store_true", help="measure other tools on the plain GPT-2s, too")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PYTHON",
                        help=f"the Python that holds a peer ({', '.join(all_peers())}); default: this")  # fmt: skip
    options = parser.parse_args(arguments)
    for option, pairs in (("--model", options.model), ("--also", options.also), ("--peer-python", options.peer_python)):
        if wrong := [pair for pair in pairs if "=" not in pair]:
            parser.error(f"{option} {wrong[0]}: give it as NAME=...")
    return options


if __name__ == "__main__":
    main()
