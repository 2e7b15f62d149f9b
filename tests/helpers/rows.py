"""Rows of comparisons with made-up figures."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.comparison.model_result import Row
from benchmarks.quality.perplexity import Quality
from benchmarks.speed.cases import Case
from benchmarks.speed.results import Speed, Timings

NOISE = np.random.default_rng(0).exponential(3.0, 4000)  # difficulty of tokens, equal for every model


def quality(perplexity: float, jitter: float = 0.1, seed: int = 1, text: str = "one", n_bytes: int = 16_000) -> Quality:
    """Quality of a model that differs from others by its mean, and from token to token by `jitter` nats."""
    nll = NOISE + jitter * np.random.default_rng(seed).standard_normal(len(NOISE))
    nll += math.log(perplexity) - nll.mean()
    return Quality(
        4512, len(nll), -float(nll.sum()), 0.3, 0.05, {}, 1024, 512, "gate_hard", text, nll, words_scored=3000,
        bytes_scored=n_bytes,
    )  # fmt: skip


def speed(name: str, decode: float) -> Speed:
    tests = [Timings(Case("pp", 128), [8 * decode] * 3), Timings(Case("tg", 64, 128), [decode] * 3, switches=3)]
    return Speed(name, tests, [0.2], 10**8, 10**8, 7, 1)


def row(
    family: str, scheme: str, megabytes: float, perplexity: float | None, decode: float | None, seed: int = 1
) -> Row:
    name = f"{family} {scheme}"
    return Row(
        name=name,
        path="somewhere",
        kind="onnx" if decode else "float",
        is_dmpt=family == "DMPT",
        family=family,
        scheme=scheme,
        control=family == "GPT-2 fine-tuned",
        parameters=1000,
        parameters_touched_per_token=900,
        size_bytes=int(megabytes * 1e6),
        quality=quality(perplexity, seed=seed) if perplexity else None,
        speed=speed(name, decode) if decode else None,
    )


BASE = row("GPT-2 base", "fp32", 23, 61, 210)

TUNED = [row("GPT-2 fine-tuned", *rest) for rest in (("fp32", 20, 50, 100), ("int8", 6, 51, 400), ("int4", 4, 55, 500))]

DMPT = [row("DMPT", *rest, seed=2) for rest in (("fp32", 60, 48, 80), ("int8", 15, 54, 300), ("int4", 10, 55.01, 550))]  # type: ignore[arg-type, misc]
