"""Measure what DMPT gains at equal tokens: train and score every variant through the command line, one by one.

    python -m benchmarks.evidence.training --data DATA --work WORK [--scale cpu] [--seeds 0,1] [--variants a,b]
    python -m benchmarks.evidence.training --data DATA --work WORK --trials 150

DATA holds enwiki/train.txt.xz and wikitext/{wiki2.train.unk.txt.xz,wiki.valid.raw,wiki.test.raw}. Every finished
training and measurement is a line of WORK/results.jsonl; a repeated command skips it, so you can stop at any time.
WORK/plan.json stores the plan; a folder with a different plan is refused. The tables go to WORK/results.md. Settings
are chosen on the validation text only (--trials: steps per setting); the test text is only reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import corpus, plan, report
from benchmarks.evidence.driver import Results, dmpt_export
from benchmarks.evidence.plan import SCALES, TRIALS, VARIANTS, Scale, Variant

COST = "cost.json"  # beside a trained model: CPU time of its training, including start-up and evaluation


@dataclass(frozen=True)
class Run:
    """One training run: its folder and its starting point."""

    name: str
    variant: Variant
    seed: int
    steps: int

    @property
    def folder(self) -> str:
        return f"{self.name.replace(' ', '_')}-s{self.seed}"


class Evidence:
    """The contents of a work folder."""

    def __init__(self, data: Path, work: Path, scale: Scale, threads: int, bf16: bool) -> None:
        """Exits when `work` holds results of a different plan."""
        claim(work, scale)
        self.work, self.scale, self.threads = work, scale, threads
        self.machine = [*(["--bf16"] if bf16 else []), "--cpu"]
        self.runs = work / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.text = corpus.prepare(data, work, scale.bytes, scale.vocab)
        self.results = Results(work / "results.jsonl")

    def cli(self, *arguments: str | Path) -> str:
        """Run a verb of dmpt-export; returns its standard output. Raises CalledProcessError when it fails."""
        return dmpt_export(*arguments, threads=self.threads, stdout=subprocess.PIPE, check=True).stdout

    # --- training ---------------------------------------------------------------------------------

    def base(self) -> Path:
        """The plain GPT-2 that every variant starts from, trained from scratch."""
        scale, out = self.scale, self.runs / "base"
        if not (out / "model.safetensors").is_file():
            sizes = {"layer": scale.layers, "embd": scale.width, "head": scale.heads, "positions": scale.context}
            shape = [part for name, value in sizes.items() for part in (f"--n-{name}", value)]
            options = plan.train_options(VARIANTS["base"], scale, 0, scale.base_steps, plan.BASE_LR)
            model = ["--from-scratch", "--tokenizer", str(self.text.tokenizer), *map(str, shape)]
            self.train(model, out, self.text.base, options)
        return out

    def train(self, model: list[str], out: Path, text: Path, options: list[str]) -> None:
        texts: list[str | Path] = ["--data", text, "--eval-data", self.text.valid, "--cache-dir", self.work / "cache"]
        before = cpu_seconds()
        self.cli("train", *model, out, *texts, "--overwrite", *options, *self.machine)
        (out / COST).write_text(json.dumps({"cpu_seconds": round(cpu_seconds() - before)}), encoding="utf-8")

    def tuned(self, run: Run) -> Path:
        """The variant's model, trained if it does not exist yet."""
        base, out = self.base(), self.runs / run.folder
        if run.steps == 0:
            return base
        if (out / "model.safetensors").is_file():
            return out
        start = base
        if not run.variant.plain:
            start = self.runs / f"{run.folder}.init"
            self.cli("init", base, start, *plan.init_options(run.variant, self.scale, run.seed))
        options = plan.train_options(run.variant, self.scale, run.seed, run.steps, self.scale.tune_lr)
        self.train([str(start)], out, self.text.tune, options)
        for useless in (self.runs / f"{run.folder}.init", out / "best", out / "last"):
            shutil.rmtree(useless, ignore_errors=True)
        return out

    # --- measuring --------------------------------------------------------------------------------

    def about(self, run: Run, model: Path) -> dict[str, Any]:
        """The fields of a result line that describe the model."""
        last = report.training_log(model / "metrics.jsonl")
        tokens = self.scale.tokens_per_step
        return {
            "variant": run.name,
            "seed": run.seed,
            "tokens": (self.scale.base_steps + run.steps) * tokens,
            "tokens_tuned": run.steps * tokens,
            "seconds": round(last["seconds"]),
            **(json.loads((model / COST).read_text(encoding="utf-8")) if (model / COST).is_file() else {}),
            "valid_perplexity": last["eval_perplexity"],
            "routes_in_training": last.get("routes"),
        }

    def measure(self, run: Run, model: Path, controls: bool) -> None:
        """One result line as deployed, and with `controls` one for every other path mode, on the test text."""
        shape: dict[str, Any] = {}
        deployed = plan.evaluations(run.variant, self.scale, controls=False)[0]
        for mode, fast_k in plan.evaluations(run.variant, self.scale, controls):
            if self.results.has(variant=run.name, seed=run.seed, mode=mode, fast_k=fast_k):
                continue
            shape = shape or json.loads(self.cli("inspect", model, "--json"))
            options = ["--data", self.text.test, "--mode", mode, "--fast-k", fast_k, "--threads", self.threads]
            started = time.monotonic()
            quality = json.loads(self.cli("eval", model, "--json", *map(str, options)))
            line = self.about(run, model) | {"fast_k": fast_k, "deployed": (mode, fast_k) == deployed}
            line |= {"eval_seconds": round(time.monotonic() - started)}
            line |= {key: quality[key] for key in ("mode", "perplexity", "accuracy", "mean_nll", "standard_error")}
            line |= {"tokens_scored": quality["tokens_scored"], "route_shares": quality["route_shares"]}
            line["switch_share"] = quality["switch_share"]
            line |= report.per_byte_and_word(quality, self.text.test) | report.parameters(shape, fast_k)
            self.results.add(line)

    def trial(self, run: Run) -> None:
        """A short run, scored on the validation text."""
        if not self.results.has(variant=run.name, seed=run.seed, mode="trial", fast_k=0):
            model = self.tuned(run)
            self.results.add(self.about(run, model) | {"mode": "trial", "fast_k": 0, "steps": run.steps})
            shutil.rmtree(model, ignore_errors=True)


def claim(work: Path, scale: Scale) -> None:
    """Store the plan in the folder; exits when the folder has a different one, or results of an unknown one."""
    file = work / "plan.json"
    settings = {"scale": asdict(scale), "common": plan.COMMON, "base_lr": plan.BASE_LR}
    text = json.dumps(settings, indent=1) + "\n"
    made = [name for name in ("results.jsonl", "runs", "tokenizer") if (work / name).exists()]
    if file.read_text(encoding="utf-8") != text if file.is_file() else made:
        sys.exit(f"{work} holds runs of a different plan: give another folder")
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def cpu_seconds() -> float:
    """CPU time of the subprocesses so far: unlike wall time, it does not count other work of the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    scale = SCALES[options.scale]
    evidence = Evidence(options.data, options.work, scale, options.threads, not options.fp32)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    table = {**VARIANTS, **TRIALS} if options.trials else VARIANTS
    names = options.variants.split(",") if options.variants else list(TRIALS if options.trials else VARIANTS)
    unknown = [name for name in names if name not in table]
    if unknown:
        sys.exit(f"unknown variants: {', '.join(unknown)}; known: {', '.join(table)}")
    for seed in seeds:
        for name in names:
            variant = table[name]
            if options.trials:
                evidence.trial(Run(f"trial {name}", variant, seed, options.trials))
            elif variant.tuned or seed == seeds[0]:
                run = Run(name, variant, seed, plan.steps_of(variant, scale))
                evidence.measure(run, evidence.tuned(run), controls=seed == seeds[0] and not options.no_controls)
            (options.work / "results.md").write_text(report.tables(evidence.results.lines), encoding="utf-8")
    sys.stdout.write(report.tables(evidence.results.lines))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--seeds", default="0", help="seeds of data order, noise and gates, such as 0,1,2")
    parser.add_argument("--variants", default="", help=f"any of {', '.join(VARIANTS)}; default: all")
    parser.add_argument(
        "--no-controls", action="store_true", help="measure only as deployed; default: the first seed in all modes"
    )
    parser.add_argument("--trials", type=int, default=0, metavar="STEPS", help="try settings instead, each so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="train in float32 instead of bfloat16 products")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
