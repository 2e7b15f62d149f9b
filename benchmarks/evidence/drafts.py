"""How many guesses of --speculate are right on held-out text, and what they do to the speed.

    python -m benchmarks.evidence.drafts DEVICE... --data TEXT [--speculate 0,1,3] [--temperature 0,1]

DEVICE are exported folders. Each continues the same prompts, cut from TEXT at even distances, once for each number of
guesses and temperature, in turn. A row: tokens per run of the graph, share of guesses that were right, tokens/s, and
the median over prompts of the time without guesses over the time with them. Prompts are not timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np

import runtime
from runtime.generate import Generation
from runtime.model import Model
from runtime.sampling import Sampling
from runtime.writing import Limits


@dataclass
class Written:
    """One continuation."""

    tokens: int
    runs: int
    drafted: int
    accepted: int
    seconds: float  # from the first token to the last


def write(model: Model, prompt: np.ndarray, n: int, speculate: int, temperature: float) -> Written:
    made = Generation(model, prompt, Sampling(temperature=temperature, seed=0), Limits(n, speculate=speculate))
    times = [time.perf_counter() for _ in made]
    return Written(len(made.ids), made.runs, made.drafted, made.accepted, times[-1] - times[0])


def prompts(model: Model, text: Path, count: int, length: int) -> list[np.ndarray]:
    ids = model.encode(text.read_text(encoding="utf-8")[: 2000 * count])
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [np.array(ids[start : start + length]) for start in starts]


def measure(folder: str, options: argparse.Namespace) -> list[str]:
    rows = []
    with runtime.load(folder, threads=options.threads) as model:
        texts = prompts(model, options.data, options.prompts, options.prompt_tokens)
        for temperature in options.temperature:
            made: dict[int, list[Written]] = {n: [] for n in options.speculate}
            for prompt, n in product(texts, options.speculate):
                made[n].append(write(model, prompt, options.tokens, n, temperature))
            for n, all_ in made.items():
                tokens, seconds = sum(w.tokens - 1 for w in all_), sum(w.seconds for w in all_)
                drafted = sum(w.drafted for w in all_)
                right = f"{sum(w.accepted for w in all_) / drafted:.1%}" if drafted else "-"
                gains = [a.seconds / b.seconds for a, b in zip(made[options.speculate[0]], all_, strict=True)]
                per_run = sum(w.tokens for w in all_) / sum(w.runs for w in all_)
                rows.append(
                    f"| {Path(folder).name} | {temperature:g} | {n} | {per_run:.3f} | {right} | {tokens / seconds:.1f} "
                    f"| {median(gains):.3f} |"
                )
    return rows


def main(arguments: list[str] | None = None) -> None:
    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="+", metavar="DEVICE")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--speculate", type=lambda text: [int(n) for n in numbers(text)], default=[0, 1, 3])
    parser.add_argument("--temperature", type=numbers, default=[0.0, 1.0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    sys.stdout.write("| model | temperature | guesses | tokens per run | right | tokens/s | gain |\n")
    sys.stdout.write("| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
    for folder in options.devices:
        sys.stdout.write("\n".join(measure(folder, options)) + "\n")


if __name__ == "__main__":
    main()
