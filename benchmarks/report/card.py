"""Measured figures on a model card: a section of README.md, and `model-index` in its metadata.

Both are replaced when the card gets new figures; everything else on the card stays unchanged. The form of `model-index`
is that of the Hugging Face hub (Model Cards, "Evaluation results"): a task, a dataset and metrics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from benchmarks.report.table import markdown, megabytes, readable
from runtime.schema import COUNT, NAME, NUMBER, NUMBER_OR_NULL
from training.checkpoints.card import BLOCK, block, card_text, title

BEGIN, END = "<!-- measured by dmpt-export -->", "<!-- end of what dmpt-export measured -->"
SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
INDEX = re.compile(r"^model-index:.*\n(?:[ \t#-].*\n|[ \t]*\n)*", re.MULTILINE)  # the key and all that belongs to it
METRICS = {  # name in a comparison -> type and name on the hub
    "perplexity": ("perplexity", "perplexity per token"),
    "word_perplexity": ("word_perplexity", "perplexity per word"),
    "bits_per_byte": ("bits_per_byte", "bits per byte"),
    "accuracy": ("accuracy", "top-1 accuracy"),
}

# What is read of a comparison, as runtime.schema checks it.
ABOUT = {"rows": [{"name": NAME, "path": NAME}], "data": [NAME], "created": NAME, "machine": {"cpu": NAME},
         "versions": {}}  # fmt: skip
ROW = {"kind": NAME, "scheme": NAME, "size_bytes": COUNT}
QUALITY = {"perplexity": NUMBER, "accuracy": NUMBER, "tokens_scored": COUNT, "protocol": NAME, "max_length": COUNT,
           "stride": COUNT}  # fmt: skip
SPEED = {"decode_tokens_per_s": NUMBER, "prefill_tokens_per_s": NUMBER, "threads": COUNT, "prompt_tokens": COUNT,
         "generated_tokens": COUNT, "repetitions": COUNT}  # fmt: skip
OPTIONAL = ("word_perplexity", "bits_per_byte")


def row_form(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row must hold for the figures that it has."""
    form: dict[str, Any] = ROW | {name: NUMBER_OR_NULL for name in OPTIONAL if name in row}
    form |= QUALITY if row.get("perplexity") is not None else {}
    return form | (SPEED if row.get("decode_tokens_per_s") is not None else {})


def with_figures(card: str, name: str, row: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The card with the figures of a row of comparison.json. name: of the model; about: the whole comparison."""
    found = BLOCK.match(card)
    fields, body = (found[1], card[found.end() :]) if found else ("", card)
    if fields and not fields.endswith("\n"):
        fields += "\n"
    index = model_index(name, row, about)
    front = INDEX.sub("", fields) + (block({"model-index": index}) if index else "")
    body = SECTION.sub("\n", body).rstrip("\n") + f"\n\n{section(row, about)}"
    return f"---\n{front}---\n{body}" if front else card_text({}, body)


def model_index(name: str, row: Mapping[str, Any], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One result with the metrics of quality; [] where none was measured."""
    metrics = [
        {"type": kind, "name": f"{words} ({protocol(row)})", "value": row[key]}
        for key, (kind, words) in METRICS.items()
        if row.get(key) is not None
    ]
    texts = text_names(about)
    if not metrics or not texts:
        return []
    task = {"type": "text-generation", "name": "Text generation"}
    result = {"task": task, "dataset": {"type": texts, "name": texts}, "metrics": metrics}
    return [{"name": title(name), "results": [result]}]


def section(row: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The measured table in Markdown, with how it was measured."""
    what = "size of graph and weights" if row["kind"] == "onnx" else "size of the weights"
    lines = [(what, megabytes(row["size_bytes"]))]
    if row.get("perplexity") is not None:
        words, accuracy = row.get("word_perplexity"), 100 * row["accuracy"]
        lines += [("perplexity per token", readable(row["perplexity"]))]
        lines += [("perplexity per word", readable(words))] if words else []
        lines += [("bits per byte", f"{row['bits_per_byte']:.4f}")] if row.get("bits_per_byte") else []
        lines += [("top-1 accuracy", f"{accuracy:.1f} %")]
    if row.get("decode_tokens_per_s") is not None:
        lines += [("decoding, tokens/s", f"{row['decode_tokens_per_s']:.1f}")]
        lines += [("reading a prompt, tokens/s", f"{row['prefill_tokens_per_s']:.0f}")]
    return f"{BEGIN}\n## Measured\n\n{markdown(['figure', 'value'], lines)}\n\n{conditions(row, about)}\n{END}\n"


def conditions(row: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """How the figures were measured, in a few sentences."""
    parts = []
    if row.get("perplexity") is not None:
        parts.append(f"Quality: {row['tokens_scored']:,} tokens of {text_names(about) or 'a text'}, {protocol(row)}.")
    if row.get("decode_tokens_per_s") is not None:
        threads = row["threads"]
        parts.append(
            f"Speed: {threads} thread{'s' * (threads > 1)} of {about['machine']['cpu']}; a prompt of "
            f"{row['prompt_tokens']} tokens, then {row['generated_tokens']} decoded, median of {row['repetitions']}."
        )
    version = about["versions"].get("dmpt-export", "")
    parts.append(f"Measured by `dmpt-export compare` {version} on {about['created'][:10]}.")
    return "\n".join(" ".join(part.split()) for part in parts)


def protocol(row: Mapping[str, Any]) -> str:
    return f"{row['protocol']}, windows of {row['max_length']}, stride {row['stride']}"


def text_names(about: Mapping[str, Any]) -> str:
    """The texts that were scored, without their folders."""
    return ", ".join(title(PurePath(text).name) for text in about["data"])
