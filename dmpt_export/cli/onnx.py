"""`dmpt-export onnx`: checkpoint -> checked ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.cli.checks import Finite, check_model, skip_verification
from dmpt_export.cli.extras import require

if TYPE_CHECKING:
    import numpy as np


@click.command("onnx", short_help="Export a checkpoint to ONNX and check the result.")
@click.argument("checkpoint")
@click.argument("out", type=click.Path())
@click.option("--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="cpu: fp32 activations; cuda: fp16.")  # fmt: skip
@click.option("--fast-k", type=click.IntRange(min=0), help="Candidates of the anchor head; 0 scores every head fully. "
              "Default: the checkpoint's.")  # fmt: skip
@click.option("--head-topk", type=click.IntRange(min=0), help="Heads mixed per token; 0 mixes all of the path.")
@click.option("--kv-cache", type=click.Choice(["float", "int8"]), default="float", show_default=True,
              help="How keys and values are kept while running: int8 takes a quarter of the memory and less time at "
              "long contexts, for a small loss (cpu only).")  # fmt: skip
@click.option("--calibrate", metavar="FILE", help="Text like that which will be read, to scale an int8 KV cache by. "
              "Default: random tokens.")  # fmt: skip
@click.option("--opset", type=click.IntRange(20, 24), default=21, show_default=True,
              help="Version of the standard operators.")  # fmt: skip
@click.option("--atol", type=Finite(min=0, min_open=True), help="Largest difference of a log-prob from "
              "torch's, with float kernels (cpu only). Default: the tolerance table's, 1e-4.")  # fmt: skip
@click.option("--no-verify", is_flag=True, callback=skip_verification,
              help="Publish without running the model against torch or a GPT-2 against Transformers.")  # fmt: skip
def command(
    checkpoint: str,
    out: str,
    target: str,
    fast_k: int | None,
    head_topk: int | None,
    kv_cache: str,
    calibrate: str | None,
    opset: int,
    atol: float | None,
    no_verify: bool,
) -> None:
    """Export CHECKPOINT to the folder OUT: one graph for prefill, decoding and scoring.

    CHECKPOINT is a DMPT folder, a quantized folder, or a GPT-2 folder or hub id. Routing becomes one If per
    path, so a path that no token takes is not computed; fast-k becomes TopK and a gather of head rows. The
    result is run and compared with torch (routes first, then log-probs, on every path) before OUT appears: a
    model that differs beyond tolerance is not published, and the exit code is 4.

    \b
    Example:
      dmpt-export quantize tuned small --scheme int8
      dmpt-export onnx small device
      dmpt-export run device "Once upon a time"

    OUT holds model.onnx, its data file, the tokenizer and dmpt_manifest.json; it can be moved anywhere, and
    running it needs neither torch nor transformers.
    """
    if calibrate is not None and kv_cache == "float":
        raise click.UsageError("--calibrate is for --kv-cache int8")
    if atol is not None and (no_verify or target == "cuda"):
        raise click.UsageError("--atol is for the check of --target cpu: leave out --no-verify or --atol")
    if target == "cuda" and kv_cache == "int8":
        raise click.UsageError("an int8 KV cache is for --target cpu: leave --kv-cache out")
    require("train", "cpu")
    from dmpt_export.onnx.exportable import deployed
    from training.checkpoints.atomic import check_inputs, check_replaceable
    from training.progress import say

    check_replaceable(Path(out), "onnx")
    check_inputs(Path(out), checkpoint, calibrate)
    deployed(check_model(checkpoint), fast_k, head_topk)
    ids = calibration_ids(checkpoint, calibrate) if calibrate is not None else None

    say("loading PyTorch and ONNX")
    from dmpt_export.onnx.export import export_onnx

    manifest = export_onnx(
        checkpoint, out, target=target, fast_k=fast_k, head_topk=head_topk, verify=not no_verify, kv_cache=kv_cache,
        calibration=ids, opset=opset, atol=atol, say=say,
    )  # fmt: skip
    click.echo(report(manifest, out), err=True)


def calibration_ids(checkpoint: str, file: str) -> np.ndarray:
    """The first tokens of a text file, as many as calibration reads."""
    from dmpt_export.onnx.kv_cache import SEQUENCES
    from training.checkpoints.files import resolve
    from training.checkpoints.folder import read_shape
    from training.errors import InputError
    from training.text.sources import check_source
    from training.text.tokenizer import load_tokenizer
    from training.text.windows import check_vocabulary, end_of_text_id, first_tokens

    check_source(file)  # before the tokenizer: that of a foreign folder takes Transformers, and seconds
    folder = resolve(checkpoint)
    shape, tokenizer = read_shape(folder), load_tokenizer(folder)
    check_vocabulary(tokenizer, shape.vocab_size, folder)
    ids = first_tokens(Path(file), tokenizer, end_of_text_id(tokenizer, shape), SEQUENCES * shape.n_positions)
    if not len(ids):
        raise InputError(f"{file} has no text to calibrate with")
    return ids


def report(manifest: dict[str, Any], out: str) -> str:
    """What was written and how closely it follows torch, in a few lines."""
    sizes = {name: file["size"] for name, file in manifest["files"].items()}
    model = sum(size for name, size in sizes.items() if name.startswith(manifest["model"]))
    parameters = manifest["parameters"]
    lines = [
        f"{out}: graph and weights {model / 1e6:.1f} MB ({sum(sizes.values()) / 1e6:.1f} MB with tokenizer and "
        f"reports), weights {manifest['quantization']['scheme']}, "
        f"{parameters['total']:,} parameters, {parameters['touched_per_token']:,} touched per token "
        f"({manifest['bytes_touched_per_token'] / 1e6:.2f} MB)"
    ]
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
            there = f"where few of them went, with all sent there ({', '.join(forced)})"
            lines.append(f"{there}: within {worst(forced):.2g}{kernels}")
    return "\n".join(lines)


def worst(runs: dict[str, Any]) -> float:
    """The largest difference of a log-prob in forced runs, by node."""
    return float(max(run["stepwise"]["max_abs_diff"] for run in runs.values()))
