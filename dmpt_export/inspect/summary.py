"""Summary of a checkpoint, a quantized folder or an ONNX folder."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.manifest_file import MANIFEST_NAME, read_manifest

BLOCK = re.compile(r"\.h\.\d+\.")


def summarise(source: str) -> dict[str, Any]:
    """Tree, heads, parameters and bytes by part.

    Returns kind ("onnx", "quantized" or "checkpoint"), config, tree, leaves, head_allocation, scheme, parameters,
    bytes, parts, tensors (name -> scheme, bits, block, bytes), and for an ONNX folder parity and operators (see
    graph_summary; without the package onnx it is None, and tensors lacks those stored as floats). An ONNX folder needs
    no torch. Raises an error with exit code 3 when `source` is not a model.
    """
    return _from_onnx(Path(source)) if (Path(source) / MANIFEST_NAME).is_file() else _from_checkpoint(source)


def _from_onnx(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    tensors = dict(manifest.raw["quantization"]["tensors"])
    counts = None
    if find_spec("onnx") is not None:
        from dmpt_export.inspect.graph_summary import float_tensors, graph_of, operators

        graph = graph_of(folder / manifest.model)
        counts = operators(graph)
        tensors |= float_tensors(graph, tensors)
    return {"kind": "onnx", **_common(manifest.raw), "tensors": tensors, "operators": counts}


def _from_checkpoint(source: str) -> dict[str, Any]:
    from dmpt_export.onnx.manifest import describe
    from quant.checkpoint import load_weights
    from quant.forms.weights import form_of
    from training.checkpoints.files import resolve

    folder = resolve(source)
    config, weights = load_weights(folder)
    manifest = describe(config, weights, "cpu", folder)
    kind = "checkpoint" if manifest["quantization"]["scheme"] == "float" else "quantized"
    tensors = dict(manifest["quantization"]["tensors"])
    for name, weight in weights.items():
        if (form := form_of(weight)).is_float:
            tensors[name] = {"scheme": form.scheme, "bits": form.bits, "block": None, "bytes": form.nbytes}
    return {"kind": kind, **_common(manifest), "tensors": tensors}


def _common(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("config", "tree", "leaves", "head_allocation", "parts", "parameters", "bytes_touched_per_token", "parity")
    return {
        "name": manifest["source"]["name"],
        "scheme": manifest["quantization"]["scheme"],
        **{key: manifest[key] for key in keys},
        "bytes": sum(part["bytes"] for part in manifest["parts"].values()),
    }


def as_text(summary: dict[str, Any], *, full: bool = False) -> str:
    """The summary as text: the tree, a table of parts and one of storage; in `full` also each tensor and operator."""
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
    lines += ["", *_storage_lines(summary["tensors"])]
    if full:
        lines += ["", *_tensor_lines(summary["tensors"])]
        if operators := summary.get("operators"):
            lines += ["", *_operator_lines(operators)]
    if summary["kind"] == "onnx" and not summary["operators"]:
        lines += ["", "to show operators, and tensors stored as floats: pip install onnx"]
    return "\n".join(lines)


def _storage_lines(tensors: dict[str, dict[str, Any]]) -> list[str]:
    """What is stored in which form, the largest first."""
    groups: dict[str, list[int]] = {}
    for tensor in tensors.values():
        groups.setdefault(_stored(tensor), []).append(tensor["bytes"])
    rows = sorted(groups.items(), key=lambda row: -sum(row[1]))
    return [
        f"{'stored as':<28}{'tensors':>14}{'MB':>10}",
        *(f"{stored:<28}{len(sizes):>14,}{sum(sizes) / 1e6:>10.2f}" for stored, sizes in rows),
    ]


def _stored(tensor: dict[str, Any]) -> str:
    return tensor["scheme"] + (f":{tensor['block']}" if tensor["block"] else "")


def _tensor_lines(tensors: dict[str, dict[str, Any]]) -> list[str]:
    """Storage of tensors, one line for those that differ only in their block."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((BLOCK.sub(".h.*.", name), _stored(tensor)), []).append(tensor["bytes"])
    lines = [f"{'tensors':<42}{'stored as':<18}{'bits':>4}{'count':>7}{'MB':>10}"]
    bits = {tensor["scheme"]: tensor["bits"] for tensor in tensors.values()}
    for (name, stored), sizes in groups.items():
        own = bits[stored.partition(":")[0]]
        lines.append(f"{name:<42}{stored:<18}{own:>4}{len(sizes):>7}{sum(sizes) / 1e6:>10.2f}")
    return lines


def _operator_lines(operators: dict[str, dict[str, int]]) -> list[str]:
    main, branches = operators["main"], operators["branches"]
    names = sorted({*main, *branches}, key=lambda name: -(main.get(name, 0) + branches.get(name, 0)))
    rows = [(name, main.get(name, 0), branches.get(name, 0)) for name in names]
    rows.append(("total", sum(main.values()), sum(branches.values())))
    return [f"{'operator':<28}{'main':>8}{'branches':>10}", *(f"{name:<28}{a:>8}{b:>10}" for name, a, b in rows)]


def usage_lines(usage: dict[str, Any]) -> list[str]:
    """benchmarks.quality.path_usage as text."""
    lines = [
        f"on {usage['tokens']:,} tokens of the text, {100 * usage['switch_share']:.1f} % on a different path from the "
        "token before:"
    ]
    for leaf, share in usage["route_shares"].items():
        heads = (usage["head_shares"] or {}).get(leaf, {})
        weights = ", ".join(f"{j}: {100 * weight:.1f} %" for j, weight in heads.items())
        lines.append(f"  {leaf}: {100 * share:.1f} % of tokens" + (f"; heads {weights}" if len(heads) > 1 else ""))
    return lines


def _row(label: str, parameters: int, size: int) -> str:
    return f"{label:<28}{parameters:>14,}{size / 1e6:>10.2f}{8 * size / max(parameters, 1):>13.2f}"


def _tree_lines(summary: dict[str, Any]) -> list[str]:
    """One line per node, indented by depth; a leaf lists its heads, the anchor first."""
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
            if summary["config"].get("head_kind") == "projected":  # absent from older exports
                line += ", projected onto one matrix" if summary["config"]["shared_anchor"] else ", others projected"
        lines.append(line)
    return lines
