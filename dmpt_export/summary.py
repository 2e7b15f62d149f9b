"""What a model is made of, read from a checkpoint, a quantized folder or an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.manifest import MANIFEST_NAME, read_manifest


def summarise(source: str) -> dict[str, Any]:
    """Tree, heads, parameters and bytes by part.

    Returns kind ("onnx", "quantized" or "checkpoint"), config, tree, leaves, head_allocation, scheme, parameters,
    bytes, parts and, for an ONNX folder, parity. An ONNX folder needs no torch. Raises an error with exit code 3
    when `source` is no model.
    """
    if (Path(source) / MANIFEST_NAME).is_file():
        return {"kind": "onnx", **_common(read_manifest(Path(source)).raw)}
    return _from_checkpoint(source)


def _from_checkpoint(source: str) -> dict[str, Any]:
    from dmpt_export.manifest import describe
    from quant.checkpoint import load_weights
    from training.checkpoint import resolve

    folder = resolve(source)
    config, weights = load_weights(folder)
    manifest = describe(config, weights, "cpu", folder)
    kind = "checkpoint" if manifest["quantization"]["scheme"] == "float" else "quantized"
    return {"kind": kind, **_common(manifest)}


def _common(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("config", "tree", "leaves", "head_allocation", "parts", "parameters", "bytes_touched_per_token", "parity")
    return {
        "name": manifest["source"]["name"],
        "scheme": manifest["quantization"]["scheme"],
        **{key: manifest[key] for key in keys},
        "bytes": sum(part["bytes"] for part in manifest["parts"].values()),
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary for people: the tree, then a table of parts."""
    config, parameters = summary["config"], summary["parameters"]
    lines = [
        f"{summary['name']}: {summary['kind']}, weights {summary['scheme']}, {config['n_layer']} blocks deep, "
        f"{config['n_embd']} wide, context {config['n_positions']}, vocabulary {config['vocab_size']}",
        "",
        *_tree_lines(summary),
        "",
        f"{'part':<28}{'parameters':>14}{'MB':>10}{'bits/weight':>13}",
    ]
    for part, counts in summary["parts"].items():
        lines.append(_row(part, counts["parameters"], counts["bytes"]))
    lines.append(_row("total", parameters["total"], summary["bytes"]))
    lines.append(_row("touched per token", parameters["touched_per_token"], summary["bytes_touched_per_token"]))
    return "\n".join(lines)


def _row(label: str, parameters: int, size: int) -> str:
    return f"{label:<28}{parameters:>14,}{size / 1e6:>10.2f}{8 * size / max(parameters, 1):>13.2f}"


def _tree_lines(summary: dict[str, Any]) -> list[str]:
    """One line per node, indented by depth; a leaf names its heads, the anchor first."""
    depth: dict[str | None, int] = {None: -1}
    fast_k = summary["config"]["fast_k"]
    lines = []
    for node in summary["tree"]:
        depth[node["name"]] = depth[node["parent"]] + 1
        blocks = f"blocks {node['start']}-{node['stop'] - 1}"
        line = f"{'  ' * depth[node['name']]}{node['name']}: {blocks}"
        if node["children"]:
            line += ", gate"
        else:
            anchor, *others = summary["head_allocation"][node["name"]]
            line += f", heads {', '.join(map(str, [anchor, *others]))}"
            if others:
                line += f" (anchor {anchor}, {f'fast-k {fast_k}' if fast_k else 'all scored fully'})"
        lines.append(line)
    return lines
