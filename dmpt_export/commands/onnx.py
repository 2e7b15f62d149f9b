"""`dmpt-export onnx`: checkpoint -> checked ONNX folder."""

from __future__ import annotations

from typing import Any

import click

from dmpt_export.extras import require


@click.command("onnx", short_help="Export a checkpoint to ONNX and check the result.")
@click.argument("checkpoint")
@click.argument("out", type=click.Path())
@click.option("--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="cpu: fp32 activations; cuda: fp16.")  # fmt: skip
@click.option("--fast-k", type=click.IntRange(min=0), help="Candidates of the anchor head; 0 scores every head fully. "
              "Default: the checkpoint's.")  # fmt: skip
@click.option("--head-topk", type=click.IntRange(min=0), help="Heads mixed per token; 0 mixes all of the path.")
@click.option("--no-verify", is_flag=True, help="Publish without running the model against torch.")
def command(checkpoint: str, out: str, target: str, fast_k: int | None, head_topk: int | None, no_verify: bool) -> None:
    """Export CHECKPOINT to the folder OUT: one graph for prefill, decoding and scoring.

    CHECKPOINT is a DMPT folder, a quantized folder, or a GPT-2 folder or hub id. Routing becomes one If per
    path, so a path that no token takes is not computed; fast-k becomes TopK and a gather of head rows. The
    result is run and compared with torch (routes first, then log-probs) before OUT appears: a model that
    differs beyond tolerance is not published, and the exit code is 4.

    \b
    Example:
      dmpt-export quantize tuned small --scheme int8
      dmpt-export onnx small device
      dmpt-export run device "Once upon a time"

    OUT holds model.onnx, its data file, the tokenizer and dmpt_manifest.json; it can be moved anywhere, and
    running it needs neither torch nor transformers.
    """
    require("train", "cpu")
    from dmpt_export.export import export_onnx

    manifest = export_onnx(checkpoint, out, target, fast_k, head_topk, verify=not no_verify)
    click.echo(report(manifest, out), err=True)


def report(manifest: dict[str, Any], out: str) -> str:
    """What was written and how closely it follows torch, in a few lines."""
    size = sum(file["size"] for file in manifest["files"].values())
    parameters = manifest["parameters"]
    lines = [
        f"{out}: {size / 1e6:.1f} MB, weights {manifest['quantization']['scheme']}, "
        f"{parameters['total']:,} parameters, {parameters['touched_per_token']:,} touched per token"
    ]
    if manifest["parity"] is None:
        lines.append("not verified against torch")
    else:
        step = manifest["parity"]["stepwise"]
        routes = "equal" if step["routes_equal"] else f"equal but for {step['near_ties']} near-ties"
        lines.append(
            f"verified on {manifest['parity']['tokens']} tokens: routes {routes}, log-probs within "
            f"{step['max_abs_diff']:.2g}, mean KL {step['kl_mean']:.2g}, same top token {step['top1_agreement']:.1%}"
        )
    return "\n".join(lines)
