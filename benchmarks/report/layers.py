"""Map of a quantized model: bits and quantization damage of every matrix, blocks as rows, matrices as columns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.scorer import config_json, kind_of
from benchmarks.report import svg
from runtime.manifest_file import REPORT_NAME, read_manifest
from training.errors import InputError

KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
OTHER = "weight"
LABEL, CELL, ROW, HEAD = 112.0, 80.0, 34.0, 30.0  # pixels
Layer = dict[str, Any]  # name, bits, scheme, block, and if known relative_error, kl


def layers(path: str | Path) -> list[Layer]:
    """The quantized tensors of an ONNX or quantized folder; [] for other models."""
    kind = kind_of(path)
    if kind == "onnx":
        tensors = read_manifest(Path(path)).raw["quantization"]["tensors"]
    elif kind == "quantized":
        tensors = config_json(Path(path))["quantization"].get("tensors", {})
    else:
        return []
    damage = damages(Path(path))
    return [{"name": name, **tensor, **damage.get(name, {})} for name, tensor in tensors.items() if tensor.get("bits")]


def damages(folder: Path) -> dict[str, dict[str, Any]]:
    """Tensor -> relative_error and kl from the folder's report; {} if it is missing or has another form."""
    try:
        tensors = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))["tensors"]
        keys = ("relative_error", "kl", "bits_per_weight")
        return {t["name"]: {key: t[key] for key in keys if isinstance(t.get(key), int | float)} for t in tensors}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def split(name: str) -> tuple[str, str]:
    """(row, column) of a tensor in the map.

    >>> split("paths.left.h.7.mlp.c_fc.weight"), split("heads.2.weight")
    (('left 7', 'mlp.c_fc'), ('heads.2', 'weight'))
    """
    stem = name.removesuffix(".weight")
    for kind in KINDS:
        if stem.endswith(f".{kind}"):
            where = stem.removesuffix(f".{kind}").removeprefix("paths.").removeprefix("transformer.")
            node, _, block = where.rpartition("h.")
            return f"{node.rstrip('.') or 'trunk'} {block}", kind
    return stem.removeprefix("transformer."), OTHER


def figures(models: Sequence[tuple[str, str]]) -> svg.Markup:
    """A map for each quantized model of (name, path); the first is open, the others are collapsed."""
    parts: list[svg.Markup] = []
    for name, path in models:
        try:
            found = layers(path)
        except (InputError, OSError):
            continue
        if found:
            opened = {} if parts else {"open": "open"}
            parts.append(svg.tag("details", svg.tag("summary", name), figure(name, found), **opened))
    return svg.together(*parts)


def figure(name: str, found: Sequence[Layer]) -> svg.Markup:
    """The map of one model, with all numbers as a table."""
    measured = any("relative_error" in layer or "kl" in layer for layer in found)
    title = f"{name}: bits{' and damage' if measured else ''} of {len(found)} tensors, {summary(found)}"
    rows = [[layer["name"], str(layer.get("scheme", "-")), str(layer["bits"]), str(layer.get("block") or "-"),
             given(layer, "relative_error"), given(layer, "kl")] for layer in found]  # fmt: skip
    head = ["tensor", "scheme", "bits", "block", "relative error", "KL alone"]
    note = "Stronger colour: more bits."
    if not measured:
        note += " Error and damage of the tensors are unknown: the folder has no quantization_report.json."
    numbers = svg.numbers(head, rows, f"Tensors of {name}", 2)
    return svg.tag("figure", draw(title, found), svg.tag("figcaption", note), numbers, aria_label=title)


def summary(found: Sequence[Layer]) -> str:
    counts: dict[int, int] = {}
    for layer in found:
        counts[layer["bits"]] = counts.get(layer["bits"], 0) + 1
    return ", ".join(f"{n} at {bits} bits" for bits, n in sorted(counts.items()))


def given(layer: Mapping[str, Any], key: str) -> str:
    return f"{layer[key]:.3g}" if key in layer else "-"


def draw(title: str, found: Sequence[Layer]) -> svg.Markup:
    lines: dict[str, dict[str, Layer]] = {}
    for layer in found:
        line, column = split(layer["name"])
        lines.setdefault(line, {})[column] = layer
    blocks = sorted((line for line in lines if OTHER not in lines[line]), key=order)
    others = [line for line in lines if OTHER in lines[line]]
    parts = [
        svg.tag("text", kind, x=LABEL + CELL * (i + 0.5), y=18, text_anchor="middle") for i, kind in enumerate(KINDS)
    ]
    for i, line in enumerate(blocks):
        top = HEAD + ROW * i
        parts.append(svg.tag("text", line, x=LABEL - 8, y=top + 20, text_anchor="end"))
        for j, kind in enumerate(KINDS):
            if kind in lines[line]:
                parts += cell(LABEL + CELL * j, top, lines[line][kind])
    for i, line in enumerate(others):  # two per line, since each has a single matrix
        top, left = HEAD + ROW * (len(blocks) + i // 2), 2 * CELL * (i % 2) + CELL
        parts += cell(LABEL + left, top, lines[line][OTHER])
        parts.append(svg.tag("text", line, x=LABEL + left - 8, y=top + 20, text_anchor="end"))
    height = HEAD + ROW * (len(blocks) + math.ceil(len(others) / 2)) + 6
    return svg.picture(title, LABEL + CELL * len(KINDS) + 4, height, *parts)


def order(line: str) -> tuple[int, str, int]:
    """Trunk first, then node by node, blocks by number."""
    node, _, block = line.rpartition(" ")
    return (node != "trunk", node, int(block) if block.isdigit() else 0)


def cell(x: float, y: float, layer: Layer) -> list[svg.Markup]:
    """Bits above, damage below if known: KL, else the relative error."""
    damage = given(layer, "kl") if "kl" in layer else given(layer, "relative_error")
    known = damage != "-"
    told = f"{layer['name']}: {layer['bits']} bits{f', damage {damage}' if known else ''}"
    box = svg.tag(
        "rect", svg.tag("title", told), x=x + 1, y=y + 1, width=CELL - 2, height=ROW - 2, rx=3,
        fill=svg.colour(1), fill_opacity=min(1.0, 0.06 * layer["bits"]),
    )  # fmt: skip
    middle = {"x": x + CELL / 2, "text_anchor": "middle"}
    text = svg.tag("text", f"{layer['bits']} bits", y=y + (15 if known else 21), **middle)
    return [box, text, *([svg.tag("text", damage, y=y + 28, class_="tick", **middle)] if known else [])]
