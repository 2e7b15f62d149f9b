"""Tables from result lines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.table import markdown
from training.text.sources import read_lines

CONTROL = "gpt2"  # the control, compared seed by seed: trained on the same tokens in the same order


def training_log(path: Path) -> dict[str, Any]:
    """The last value of each metric in a run's metrics.jsonl."""
    merged: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        merged |= json.loads(line)
    return merged


def per_byte_and_word(quality: dict[str, Any], text: Path) -> dict[str, float]:
    """Figures that compare across tokenizers: the text's nats, from the mean of the scored tokens, per byte and word.

    A line end counts as one byte and one word, because the end-of-text after it counts as a token.
    """
    lines = list(read_lines(text))
    nats = quality["mean_nll"] * quality["tokens"]
    size = sum(len(line.encode()) + 1 for line in lines)
    words = sum(len(line.split()) + 1 for line in lines)
    return {"bits_per_byte": nats / size / math.log(2), "word_perplexity": math.exp(nats / words)}


def parameters(shape: dict[str, Any], fast_k: int) -> dict[str, int]:
    """Total and touched parameters per token, from `dmpt-export inspect --json`; fast_k 0: all heads in full.

    `shape` counts for the checkpoint's own fast_k; the measurement may have used another value.
    """
    config, touched = shape["config"], shape["parameters"]["touched_per_token"]
    others = max(len(heads) for heads in shape["head_allocation"].values()) - 1
    if config.get("head_kind", "full") == "full":
        rows, counted = (k or config["vocab_size"] for k in (fast_k, config["fast_k"]))
    else:  # under fast-k, projected heads read rows of a matrix that is read anyway
        rows, counted = (0 if k else config["vocab_size"] for k in (fast_k, config["fast_k"]))
    touched += others * (rows - counted) * config["n_embd"]
    return {"parameters": shape["parameters"]["total"], "touched_per_token": touched}


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown: the models as deployed; the same models with other routing; trials."""
    deployed = [line for line in lines if line["mode"] == "gate_hard"]
    controls = [line for line in lines if line["mode"] not in ("gate_hard", "trial")]
    trials = [line for line in lines if line["mode"] == "trial"]
    out = [_deployed(deployed)] if deployed else []
    if controls:
        out.append(_controls(deployed, controls))
    if trials:
        head = ["trial", "seed", "steps", "valid perplexity", "seconds"]
        rows = [
            [x["variant"].removeprefix("trial "), str(x["seed"]), str(x["steps"]), f"{x['valid_perplexity']:.2f}",
             str(x["seconds"])] for x in trials
        ]  # fmt: skip
        out.append(markdown(head, rows))
    return "\n\n".join(out) + "\n"


def _deployed(lines: list[dict[str, Any]]) -> str:
    head = ["variant", "fast-k", "seeds", "valid ppl", "test ppl", "against gpt2", "word ppl", "bits/byte", "accuracy",
            "switches", "parameters", "touched", "tokens", "CPU s"]  # fmt: skip
    plain = {line["seed"]: line["perplexity"] for line in lines if line["variant"] == CONTROL}
    rows = []
    for name, fast_k in dict.fromkeys((line["variant"], line["fast_k"]) for line in lines):
        same = [line for line in lines if (line["variant"], line["fast_k"]) == (name, fast_k)]
        first = same[0]
        ratios = [100 * (x["perplexity"] / plain[x["seed"]] - 1) for x in same if x["seed"] in plain]
        rows.append([
            name, str(fast_k or "off"), ",".join(str(x["seed"]) for x in same),
            spread([x["valid_perplexity"] for x in same if x["deployed"]]), spread([x["perplexity"] for x in same]),
            f"{spread(ratios)} %" if ratios and name != CONTROL else "",
            spread([x["word_perplexity"] for x in same], 1), spread([x["bits_per_byte"] for x in same], 4),
            f"{100 * np.mean([x['accuracy'] for x in same]):.2f} %", switches(same),
            f"{first['parameters'] / 1e6:.2f} M",
            f"{first['touched_per_token'] / 1e6:.2f} M", f"{first['tokens'] / 1e6:.2f} M",
            spread([x["cpu_seconds"] for x in same if "cpu_seconds" in x], 0),
        ])  # fmt: skip
    return markdown(head, rows)


def switches(lines: Sequence[dict[str, Any]]) -> str:
    """Share of tokens on a different path from the token before, on average; nothing for models of one path."""
    routed = [line for line in lines if len(line["route_shares"]) > 1 and "switch_share" in line]
    return f"{spread([100 * line['switch_share'] for line in routed], 1)} %" if routed else ""


def _controls(deployed: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    """Test perplexity with one column per path mode, same seeds; the first column is the deployed mode."""
    modes = list(dict.fromkeys(line["mode"] for line in lines))
    rows = []
    for name in dict.fromkeys(line["variant"] for line in lines):
        seeds = {x["seed"] for x in lines if x["variant"] == name}
        hard = [x for x in deployed if x["variant"] == name and x["deployed"] and x["seed"] in seeds]
        cells = [[x["perplexity"] for x in lines if (x["variant"], x["mode"]) == (name, mode)] for mode in modes]
        shares = {leaf: f"{100 * share:.0f}" for x in hard[:1] for leaf, share in x["route_shares"].items()}
        rows.append([name, spread([x["perplexity"] for x in hard]), *map(spread, cells), "/".join(shares.values())])
    return markdown(["test perplexity", "gate_hard", *modes, "routes, %"], rows)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and with several seeds their sample standard deviation.

    >>> spread([10.0]), spread([10.0, 12.0])
    ('10.00', '11.00 ± 1.41')
    """
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
