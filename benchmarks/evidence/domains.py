"""Measure what domains bring: GPT-2 and DMPT on a mix of two unlike texts, at equal tokens.

    python -m benchmarks.evidence.domains --base BASE --prose TRAIN.txt --prose-test TEST.txt --work WORK [--steps 500]

BASE is a plain GPT-2, such as WORK/runs/base of benchmarks.evidence.training. The second domain is the source of
Python's standard library, line by line without indentation, every tenth file of it held out. Both domains give the same
number of tokens. Every training is a folder in WORK, every measurement a line of WORK/results.jsonl; a repeated command
skips what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence import plan
from benchmarks.evidence.driver import Results, dmpt_export, say
from training.checkpoints.atomic import atomic_file
from training.text.sources import read_lines
from training.text.tokenizer import load_tokenizer

PROSE, CODE = "prose", "code"
SCALE = plan.SCALES["pilot"]
HELD_OUT = 10  # one file of so many


@dataclass(frozen=True)
class Run:
    about: str
    texts: tuple[str, ...] = (PROSE, CODE)
    dmpt: bool = False
    taught: bool = False  # the texts have the names of their domains
    share: float = 1.0  # of the steps


RUNS = {
    "gpt2-mix": Run("GPT-2 on the mix"),
    "dmpt-mix": Run("DMPT on the mix", dmpt=True),
    "dmpt-domains": Run("DMPT, each domain taught its path", dmpt=True, taught=True),
    "gpt2-prose": Run("GPT-2 on prose alone", (PROSE,), share=0.5),
    "gpt2-code": Run("GPT-2 on code alone", (CODE,), share=0.5),
}


def main() -> None:
    options = parse()
    work, base = options.work, options.base
    work.mkdir(parents=True, exist_ok=True)
    texts = prepare(work, base, options.prose, options.prose_test, options.steps * SCALE.tokens_per_step // 2)
    results = Results(work / "results.jsonl")
    for name, run in RUNS.items():
        out = work / name
        if not (out / "model.safetensors").is_file():
            say(f"training {name}")
            train(run, base, out, texts, round(options.steps * run.share))
        if not results.has(run=name):
            given = [part for domain in (PROSE, CODE) for part in ("--domain", f"{domain}={texts[domain, 'test']}")]
            found = dmpt_export("eval", out, *given, "--json", threads=1, stdout=subprocess.PIPE, check=True).stdout
            last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            results.add({"run": name, "about": run.about, "seconds": last["seconds"], **json.loads(found)})


def train(run: Run, base: Path, out: Path, texts: dict[tuple[str, str], Path], steps: int) -> None:
    variant, start = plan.VARIANTS["dual-one-anchor" if run.dmpt else "gpt2"], base
    if run.dmpt:
        start = out.with_suffix(".init")
        dmpt_export("init", base, start, "--overwrite", *plan.init_options(variant, SCALE, 0), check=True)
    given: list[object] = []
    for text in run.texts:
        file = texts[text, "train"]
        given += ["--domain", f"{text}={file}"] if run.taught else ["--data", file]
    options = plan.train_options(variant, SCALE, 0, steps, SCALE.tune_lr)
    cache = out.parent / "cache"
    dmpt_export("train", start, out, *given, "--cache-dir", cache, "--overwrite", *options, "--cpu", threads=1,
                check=True)  # fmt: skip


def prepare(work: Path, base: Path, prose: Path, prose_test: Path, tokens: int) -> dict[tuple[str, str], Path]:
    """The four texts, as files of WORK; the training texts of `tokens` tokens each, test texts of 60,000 at most."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [file for file in sorted(library.rglob("*.py")) if not {"site-packages", "test"} & set(file.parts)]
    lines = {
        (PROSE, "train"): read_lines(prose),
        (PROSE, "test"): read_lines(prose_test),
        (CODE, "train"): (line for i, file in enumerate(sources) if i % HELD_OUT for line in source_lines(file)),
        (CODE, "test"): (line for file in sources[::HELD_OUT] for line in source_lines(file)),
    }
    tokenizer, out = load_tokenizer(base), {}
    for (domain, part), found in lines.items():
        path = out[domain, part] = work / f"{domain}.{part}.{tokens}.txt"
        if path.is_file():
            continue
        kept, left = [], tokens if part == "train" else 60_000
        for line in found:
            kept.append(line)
            left -= len(tokenizer.encode(line, add_special_tokens=False).ids) + 1
            if left <= 0:
                break
        with atomic_file(path) as part_written:
            part_written.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return out


def source_lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8", errors="ignore")
    return [line.strip() for line in text.splitlines() if line.strip()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a plain GPT-2")
    parser.add_argument("--prose", type=Path, required=True, help="text to train on")
    parser.add_argument("--prose-test", type=Path, required=True, help="held-out text of the same kind")
    parser.add_argument("--work", type=Path, required=True, help="folder for texts, models and results")
    parser.add_argument("--steps", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()
