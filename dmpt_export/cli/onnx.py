"""`dmpt-export onnx`: checkpoint -> checked ONNX folder."""

from __future__ import annotations

from typing import Any

import click

from dmpt_export.cli.checks import Finite, overwrite, skip_verification
from dmpt_export.cli.storage import storage_options
from dmpt_export.requests.onnx import ExportRequest


@click.command("onnx", short_help="Export a checkpoint to ONNX and check the result.")
@click.argument("checkpoint")
@click.argument("out", type=click.Path())
@storage_options
@click.option("--layout", type=click.Choice(["native", "standard"]), default="native", show_default=True,
              help="native: for dmpt-export's runtime; standard: a folder that optimum, onnxruntime-genai and "
              "transformers.js open, where every path is computed for every token.")  # fmt: skip
@click.option("--target", type=click.Choice(["cpu", "cuda", "web"]), default="cpu", show_default=True,
              help="cpu: float32 activations; cuda: float16; web: as cpu, in what browsers run fast: without --scheme, "
              "int8-dynamic for every matrix.")  # fmt: skip
@click.option("--only-path", metavar="LEAF", help="Export one path alone, as a model without routing: for a "
              "device that serves one domain. --rule is then for that model's names (transformer.h.*).")  # fmt: skip
@click.option("--fast-k", type=click.IntRange(min=0), help="Candidates of the anchor head; 0 scores every head fully. "
              "Default: the checkpoint's.")  # fmt: skip
@click.option("--head-topk", type=click.IntRange(min=0), help="Heads mixed per token; 0 mixes all of the path.")
@click.option("--kv-cache", type=click.Choice(["float", "int8"]), default="float", show_default=True,
              help="Storage of keys and values: int8 needs a quarter of the memory and less time at long contexts, "
              "with a small loss (not cuda).")  # fmt: skip
@click.option("--calib", metavar="FILE", help="Typical text: for quantizing, and to calibrate the scales of an int8 KV "
              "cache (default there: random tokens).")  # fmt: skip
@click.option("--draft-vocab", type=click.IntRange(min=0), metavar="N", help="Tokens that draft heads choose among; 0 "
              "leaves the draft heads out. Default: 8192, or all if there are fewer.")  # fmt: skip
@click.option("--draft-text", metavar="FILE", help="Text like the training text: draft heads choose among its most "
              "frequent tokens. Default: the lowest ids, in a BPE those of the most frequent strings.")  # fmt: skip
@click.option("--opset", type=click.IntRange(20, 24), default=21, show_default=True,
              help="Version of the standard operators.")  # fmt: skip
@click.option("--atol", type=Finite(min=0, min_open=True), help="Largest allowed difference of a log-prob "
              "from torch, with float kernels (not cuda). Default: the tolerance table's, 1e-4.")  # fmt: skip
@click.option("--no-verify", is_flag=True, callback=skip_verification,
              help="Publish without comparing the model with torch, or a GPT-2 with Transformers.")  # fmt: skip
@overwrite
def command(**fields: Any) -> None:
    """Export CHECKPOINT to the folder OUT: one graph for prefill, decoding and scoring.

    CHECKPOINT is a DMPT folder, a quantized folder, or a GPT-2 folder or hub id. Routing becomes one If per
    path, so a path without tokens is not computed (with --layout standard all are); fast-k becomes TopK and a
    gather of head rows. The result is
    run and compared with torch (routes first, then log-probs, on every path) before OUT appears. If it differs
    beyond tolerance, it is not published and the exit code is 4.

    With --scheme, --target-size or --plan the weights are quantized on the way, as `dmpt-export quantize` does it.

    \b
    Example:
      dmpt-export onnx gpt2 device --scheme int8
      dmpt-export run device "Once upon a time"

    OUT holds model.onnx, its data file, the tokenizer and dmpt_manifest.json; it can be moved anywhere, and
    running it needs neither torch nor Transformers.
    """
    request = ExportRequest(**fields)
    manifest = request.run(request.check())
    click.echo(report(manifest, request.out), err=True)


def report(manifest: dict[str, Any], out: str) -> str:
    """A few lines on the written files and the differences from torch."""
    sizes = {name: file["size"] for name, file in manifest["files"].items()}
    model = sum(size for name, size in sizes.items() if name.endswith((".onnx", ".onnx.data", ".onnx_data")))
    parameters = manifest["parameters"]
    lines = [
        f"{out}: graph and weights {model / 1e6:.1f} MB ({sum(sizes.values()) / 1e6:.1f} MB with tokenizer and "
        f"reports), weights {manifest['quantization']['scheme']}, "
        f"{parameters['total']:,} parameters, {parameters['touched_per_token']:,} touched per token "
        f"({manifest['bytes_touched_per_token'] / 1e6:.2f} MB)"
    ]
    if "graphs" in manifest:
        from dmpt_export.onnx.standard import cache_line

        lines.append(cache_line(manifest))
    if manifest["parity"] is None:
        lines.append("not verified against torch")
    else:
        step = manifest["parity"]["stepwise"]
        kl = max(step["kl_mean"], 0)
        routes = "equal" if step["routes_equal"] else f"equal but for {step['near_ties']} near-ties"
        lines.append(
            f"verified on {manifest['parity']['tokens']} tokens: routes {routes}, log-probs within "
            f"{step['max_abs_diff']:.2g}, mean KL {kl:.2g}, same top token {step['top1_agreement']:.1%}"
        )
        exact = manifest["parity"].get("float_kernels")
        if exact:
            lines.append(f"with float kernels: log-probs within {exact['stepwise']['max_abs_diff']:.2g}")
        if forced := manifest["parity"]["forced"]:
            kernels = f", {worst(exact['forced']):.2g} with float kernels" if exact else ""
            there = f"rarely used nodes, with all tokens sent there ({', '.join(forced)})"
            lines.append(f"{there}: within {worst(forced):.2g}{kernels}")
    return "\n".join(lines)


def worst(runs: dict[str, Any]) -> float:
    """The largest difference of a log-prob in forced runs, by node."""
    return float(max(run["stepwise"]["max_abs_diff"] for run in runs.values()))
