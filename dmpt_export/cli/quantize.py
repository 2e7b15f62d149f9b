"""`dmpt-export quantize`: float checkpoint -> quantized checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dmpt_export.cli.checks import Finite, no_verify, overwrite
from dmpt_export.cli.storage import storage_options
from dmpt_export.requests.quantize import SIZE, SPEED, QuantizeRequest


@click.command("quantize", short_help="Store a checkpoint's weights in fewer bits.")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(), required=False)
@storage_options
@click.option("--calib", metavar="FILE", type=click.Path(), help="Calibration text, typical of the model's input: for "
              "the gptq schemes, --smooth, plans, and the damage of each tensor in the report.")  # fmt: skip
@click.option("--calib-tokens", type=click.IntRange(min=2), default=8192, show_default=True,
              help="Number of calibration tokens to use.")  # fmt: skip
@click.option("--smooth", type=Finite(0, 1), metavar="ALPHA", help="For int8-dynamic: balance "
              "activations (1) against weights (0) first; 0.5 is usual.")  # fmt: skip
@click.option("--target-kl", type=Finite(min=0, min_open=True), metavar="NATS",
              help="Plan: smallest model whose KL to the float model on that text is at most this.")  # fmt: skip
@click.option("--target-bits", type=Finite(min=0, min_open=True), metavar="BITS",
              help="Plan: least damage within this number of bits per weight, counting all tensors.")  # fmt: skip
@click.option("--candidates", metavar="SCHEME,...", help="Schemes that a plan chooses from for each group, such as "
              "int8,int4:32,int2-gptq; a number of bits means a scheme as in --rule.  [int8, and int4-gptq in "
              "blocks of 16 to 128; int8 and int8-dynamic for speed]")  # fmt: skip
@click.option("--prefer", type=click.Choice([SIZE, SPEED]), default=SIZE, show_default=True,
              help="Within --target-kl: the smallest model, or as much of it as possible in int8-dynamic, which "
              "reads long prompts faster (one text at a time, no --speculate).")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the result but write no model; OUT is optional.")
@click.option("--cache-dir", type=click.Path(path_type=Path),
              help="Cache of measured damages: a killed plan continues, a new target is fast.  "
              "[default: ~/.cache/dmpt-export]")  # fmt: skip
@no_verify
@click.option("--tensors", is_flag=True, help="Also print a line for each tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with everything.")
@overwrite
def command(tensors: bool, as_json: bool, **fields: Any) -> None:
    """Quantize the weights of CHECKPOINT into the folder OUT and report the damage.

    CHECKPOINT is a DMPT folder, or a GPT-2 folder or hub id. All linear layers of the blocks, the token
    embedding and the vocabulary heads are quantized; norms, biases, positions and gates stay float32.

    \b
    int8          8 bits per weight, a scale per block; close to lossless
    int4          4 bits per weight, a scale per block; small and fast to decode
    int4-hqq      4 bits and zero points, fitted to most weights rather than to outliers
    int4-gptq     4 bits, rounded for the least error on calibration text (--calib)
    int3, int3-gptq  3 bits stored in 4, for comparison: no smaller than int4
    int2, int2-gptq  2 bits; for single layers, see --layer-bits
    int8-dynamic  8 bits, a scale per output; activations are rounded too (CPU only): the fastest to read
                  long prompts, but check the quality with `dmpt-export eval`
    nf4, fp4      bitsandbytes' 4 bits in the blocks, int8 for embedding and heads
    bnb-int8      bitsandbytes' 8 bits, a scale per output
    fp16          half the size on disk; on a CPU, speed and memory as in float32

    With --target-size, --target-kl or --target-bits each attention, MLP, embedding and head gets bits by its
    measured damage: KL to the float model on the calibration text.

    \b
    In rules for heads also:
    delta-rN      as its path's first head (the anchor) plus a delta of rank N (16, 32, 64, 128, 256); the heads of
                  a path share the larger factor, so a row of 4-bit codes serves all of them. heads.*=delta-rN skips
                  the anchors, which keep their own scheme.

    \b
    Examples:
      dmpt-export quantize tuned small --scheme int4-gptq --calib train.txt --rule 'transformer.wte=int8:64'
      dmpt-export quantize tuned small --scheme int4 --rule 'heads.*=delta-r64'
      dmpt-export quantize tuned small --target-size 200MB --calib train.txt
      dmpt-export quantize tuned fast --target-kl 0.01 --prefer speed --smooth 0.5 --calib train.txt
      dmpt-export onnx small device

    OUT gets quantization_report.json and .svg: bits, error and damage of every tensor; a plan also plan.json.
    """
    request = QuantizeRequest(**fields)
    result = request.run(request.check())
    from benchmarks.report.quantization import report_json, show

    reports, plan = result.reports, result.plan
    click.echo(json.dumps(report_json(reports, plan)) if as_json else show(reports, plan, tensors))
    if request.out and not request.dry_run:
        click.echo(f"wrote {request.out}; next: dmpt-export onnx {request.out} DEVICE_FOLDER", err=True)
