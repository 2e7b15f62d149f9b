"""Results of comparing quantized models with their float model: one line per measurement, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality.perplexity import Quality
from benchmarks.report.table import markdown


def figures(found: Quality) -> dict[str, Any]:
    """The figures that a result line stores for a model compared with its base; KL(float || quantized) in nats."""
    base = found.base
    assert base is not None
    return {
        "tokens": found.tokens_scored,
        "perplexity": found.perplexity,
        "reference_perplexity": base["perplexity"],
        "mean_kl": base["kl_mean"],
        "kl_p99": base["kl_99"],
        "same_top": base["top1_agreement"],
    }


def table(lines: Sequence[dict[str, Any]], absent: Sequence[str]) -> str:
    """One Markdown table per model, ours first, each sorted by size; then what could not be measured."""
    head = ["stored as", "MB on disk", "ONNX MB", "perplexity", "change", "mean KL", "99 % KL", "same top token", "s"]
    out = []
    for model in dict.fromkeys(line["model"] for line in lines):
        latest = {line["name"]: line for line in lines if line["model"] == model}
        rows = sorted(latest.values(), key=lambda line: (line["peer"], -line["onnx_bytes"]))
        first = rows[0]
        about = f"{first['tokens']} tokens of {first['text']}, float perplexity {first['reference_perplexity']:.3f}"
        out.append(f"{model}: {about}\n\n{markdown(head, [_row(line) for line in rows])}")
    return "\n\n".join([*out, *absent]) + "\n"


def _row(line: dict[str, Any]) -> list[str]:
    change = 100 * (line["perplexity"] / line["reference_perplexity"] - 1)
    disk = f"{line['weights_bytes'] / 1e6:.2f}" if "weights_bytes" in line else ""
    return [
        line["name"], disk, f"{line['onnx_bytes'] / 1e6:.2f}", f"{line['perplexity']:.3f}", f"{change:+.2f} %",
        f"{max(line['mean_kl'], 0):.5f}", f"{max(line['kl_p99'], 0):.4f}", f"{100 * line['same_top']:.2f} %",
        f"{line['seconds']:.0f}" if "seconds" in line else "",
    ]  # fmt: skip
