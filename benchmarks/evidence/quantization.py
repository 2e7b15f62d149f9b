"""Measure the loss of quantization: every scheme, every planned size, and other tools for plain GPT-2.

    python -m benchmarks.evidence.quantization --work WORK --model gpt2=DIR --model dual=DIR \
        --calib tune.txt --text test.txt [--tokens 40000] [--sizes 1.5MB,1MB] \
        [--also 'int4 deltas=--scheme int4 --rule heads.*=delta-r64'] [--peer-python openvino=/venv/bin/python ...]

Models are quantized and exported through the command line; calibrated schemes and plans only see the calibration text.
Each result is compared with the float checkpoint in torch, like `dmpt-export eval --base` (the checkpoint's log-probs
are cached in WORK/reference). Peers get the same weights, each optionally in its own Python. Every measurement is a
line of WORK/results.jsonl; a repeated command skips it unless the checkpoint, its text or the options have changed.
The table goes to WORK/quantization.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.evidence.driver import Results, add_peer_python, dmpt_export, say
from benchmarks.evidence.quantization_report import figures, table
from benchmarks.peers import registry
from benchmarks.peers.adapters import FACTS
from benchmarks.peers.registry import Peer
from benchmarks.quality.divergence import Base
from benchmarks.quality.open_scorer import open_scorer
from benchmarks.quality.peer_scorer import PeerScorer
from benchmarks.quality.perplexity import evaluate, read_tokens, sha256
from benchmarks.quality.progress import fingerprint, key_of
from benchmarks.quality.scorer import Scorer, onnx_size, weight_files
from benchmarks.speed.processes import WorkerFailed, worker
from benchmarks.speed.timing import Target
from training.errors import InputError, ValidationError

FLOAT = "float32"  # the variant that is exported without quantization
SCHEMES = ("fp16", "int8", "bnb-int8", "int8-dynamic", "int4", "int4-hqq", "int4-gptq", "nf4", "fp4", "int3",
           "int3-gptq", "int2", "int2-gptq")  # fmt: skip
CALIBRATED = {scheme for scheme in SCHEMES if scheme.endswith("-gptq")}
ORT = Peer(
    "benchmarks.peers.adapters.ort_quantizers",
    ("dynamic", "rtn-8", "rtn-4", "hqq-4", "kquant-4"),
    ("optimum-onnx", "onnxruntime", "accelerate", "onnx-ir"),
    "pip install 'optimum-onnx[onnxruntime]' accelerate onnx-ir",
)


def all_peers() -> dict[str, Peer]:
    """Every peer with quantized weights."""
    return {**registry.PEERS, "onnxruntime": ORT}


def variants(calib: Path, sizes: list[str], also: list[str]) -> dict[str, list[str]]:
    """Name -> options of `dmpt-export quantize`: all registered schemes, the planned sizes, and given NAME=OPTIONS."""
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


class Subject:
    """A float checkpoint on the text: the reference for all models made from it."""

    def __init__(self, name: str, source: Path, text: Path, tokens: int, threads: int, cache: Path) -> None:
        """cache: folder for its log-probs. Raises InputError for an unusable checkpoint or text."""
        self.name, self.source = name, source
        self.base = Base(open_scorer(source, threads), cache)
        self.ids = read_tokens(self.base.scorer, [text])[:tokens]
        against = key_of(model=fingerprint(self.base.scorer), tokens=sha256(self.ids))
        self.key = {"model": name, "against": against, "text": text.name}


class Evidence:
    """The contents of a work folder."""

    def __init__(self, work: Path, calib: Path, threads: int) -> None:
        self.work, self.calib, self.threads = work, calib, threads
        work.mkdir(parents=True, exist_ok=True)
        self.results = Results(work / "results.jsonl")
        self.asked: list[dict[str, str]] = []  # keys of the lines that this run needs
        self.current: dict[str, str] = {}  # model -> "against" of its lines that the table shows
        self.absent: list[str] = []

    def cli(self, *arguments: str | Path) -> None:
        """Run a verb of dmpt-export. Raises InputError with its last line when it fails."""
        done = dmpt_export(*arguments, threads=self.threads, capture_output=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise InputError(said[-1].removeprefix("Error: "))

    def subject(self, name: str, source: Path, text: Path, tokens: int) -> Subject:
        subject = Subject(name, source, text, tokens, self.threads, self.work / "reference")
        self.current[name] = subject.key["against"]
        return subject

    def measure(self, subject: Subject, key: dict[str, str], scorer: Scorer, **facts: Any) -> None:
        """One line of results; closes the scorer. Raises ValidationError for figures that are not finite."""
        try:
            found = evaluate(scorer, subject.ids, base=subject.base)
        finally:
            scorer.close()
        self.results.add(key | figures(found) | facts)

    def table(self) -> str:
        lines = self.results.lines
        current = {line["model"]: line.get("against") for line in lines} | self.current
        shown = [line for line in lines if line.get("against") == current[line["model"]]]
        # the last line of a name is shown: make that the one requested in this run
        shown.sort(key=lambda line: any(key.items() <= line.items() for key in self.asked))
        return table(shown, self.absent)

    # --- ours -------------------------------------------------------------------------------------

    def ours(self, subject: Subject, name: str, options: list[str]) -> None:
        """Quantize, export, score; the models stay in WORK/made until they are measured."""
        key = subject.key | {"name": name, "options": self.told(options)}
        self.asked.append(key)
        if self.results.has(**key):
            return
        say(f"{subject.name}: {name}")
        made = self.work / "made"
        shutil.rmtree(made, ignore_errors=True)
        started = time.monotonic()
        try:
            if options:
                self.cli("quantize", subject.source, made / "quantized", *options)
            seconds = time.monotonic() - started
            folder = made / "quantized" if options else subject.source
            self.cli("onnx", folder, made / "onnx")
            weights = sum(file.stat().st_size for file in weight_files(folder))
            sizes = {"onnx_bytes": onnx_size(made / "onnx"), "weights_bytes": weights}
            scorer = open_scorer(made / "onnx", self.threads, name=name)
            self.measure(subject, key, scorer, **sizes, seconds=round(seconds, 1), peer=False)
            shutil.rmtree(made)
        except (InputError, ValidationError) as error:
            self.absent.append(f"{subject.name} {name} is not measured: {error}")

    def told(self, options: list[str]) -> str:
        """Options with the calibration text replaced by its hash, so that a different text is a new measurement."""
        calib = str(self.calib)
        if calib not in options or not self.calib.is_file():  # if it is missing, quantize reports it
            return " ".join(options)
        digest = hashlib.sha256(self.calib.read_bytes()).hexdigest()
        return " ".join(f"sha256:{digest}" if word == calib else word for word in options)

    # --- peers ------------------------------------------------------------------------------------

    def theirs(self, subject: Subject, pythons: dict[str, str]) -> None:
        """All installed peers; for the others a line on how to install them, or why they failed."""
        for name, peer in all_peers().items():
            keys = {scheme: subject.key | {"name": f"{name} {scheme}"} for scheme in peer.schemes}
            self.asked += keys.values()
            wanted = [scheme for scheme in peer.schemes if not self.results.has(**keys[scheme])]
            if not wanted:
                continue
            with worker(name, pythons.get(name)) as w:
                found = w.ask(do="versions", packages=list(peer.packages))
            if lacking := [package for package in peer.packages if found[package] is None]:
                self.absent.append(f"{name} is not measured: {registry.absence(peer, lacking)}")
                continue
            for scheme in wanted:
                say(f"{subject.name}: {name} {scheme}")
                try:
                    self.peer(subject, keys[scheme], scheme, peer, pythons.get(name), found)
                except (WorkerFailed, ValidationError) as error:
                    self.absent.append(f"{name} {scheme} is not measured: {error}")

    def peer(
        self, subject: Subject, key: dict[str, str], scheme: str, peer: Peer, python: str | None, versions: Any
    ) -> None:
        """Convert in one process and score in another, as a user would."""
        out = self.work / "peer"
        shutil.rmtree(out, ignore_errors=True)
        plain = registry.gpt2_folder(subject.source, self.work / "gpt2" / subject.name)
        with worker(key["name"], python) as w:
            facts = w.ask(do="convert", adapter=peer.adapter, source=str(plain.resolve()), out=str(out), scheme=scheme)
        facts["versions"] = versions
        (out / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        size = int(facts["size_bytes"])
        target = Target(key["name"], str(out), peer.adapter, size, python=python)
        scorer = PeerScorer(target, scheme, subject.base.scorer.folder, plain, self.threads)
        self.measure(subject, key, scorer, onnx_bytes=size, peer=True, facts=facts)
        shutil.rmtree(out)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    evidence = Evidence(options.work, options.calib, options.threads)
    models = {name: Path(path) for name, path in (pair.split("=", 1) for pair in options.model)}
    known = variants(options.calib, options.sizes.split(",") if options.sizes else [], options.also)
    names = options.variants.split(",") if options.variants else list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown variants: {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        for model, source in models.items():
            subject = evidence.subject(model, source, options.text, options.tokens)
            for name in names:
                evidence.ours(subject, name, known[name])
            if options.peers and subject.base.scorer.family == "GPT-2":  # peers only run GPT-2
                evidence.theirs(subject, dict(options.peer_python))
            subject.base.close()
    except (InputError, WorkerFailed) as error:
        say(f"Error: {error}")
        sys.exit(error.exit_code)
    finally:
        text = evidence.table()
        (options.work / "quantization.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="a float checkpoint")
    parser.add_argument("--calib", type=Path, required=True, help="text for calibrated schemes and plans")
    parser.add_argument("--text", type=Path, required=True, help="text that results are measured on")
    parser.add_argument("--tokens", type=int, default=40_000, help="number of its first tokens to score")
    parser.add_argument("--variants", default="", help="only these variants, comma-separated")
    parser.add_argument("--sizes", default="", help="sizes to plan for, such as 1.5MB,1MB")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=OPTIONS",
                        help="a further variant: options of dmpt-export quantize, with CALIB for the text")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", action="store_true", help="also measure other tools on the plain GPT-2 models")
    add_peer_python(parser, all_peers())
    options = parser.parse_args(arguments)
    for option, pairs in (("--model", options.model), ("--also", options.also)):
        if wrong := [pair for pair in pairs if "=" not in pair]:
            parser.error(f"{option} {wrong[0]}: give it as NAME=...")
    return options


if __name__ == "__main__":
    main()
