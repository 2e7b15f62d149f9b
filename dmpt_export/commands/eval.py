"""`dmpt-export eval`: perplexity and accuracy of a model on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dmpt_export.extras import require

if TYPE_CHECKING:
    from benchmarks.quality import Quality
    from training.model import DMPTForCausalLM


@click.command("eval", short_help="Measure perplexity and accuracy on a text.")
@click.argument("model")
@click.option("--data", multiple=True, required=True, type=click.Path(dir_okay=False), metavar="FILE",
              help="Text: plain, JSONL (both also .xz, .gz, .zst), Parquet, or a hub dataset such as "
              "wikitext-103:test. Several are scored as one text.")  # fmt: skip
@click.option("--text-field", default="text", show_default=True, metavar="NAME",
              help="Where the text is in JSONL, Parquet and datasets.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2), metavar="N",
              help="Tokens in a window. Default: 1024, or the model's context if that is less.")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), metavar="N",
              help="Predictions scored in each window. Default: half a window.")  # fmt: skip
@click.option("--mode", default="gate_hard", show_default=True,
              help="Path mode; checkpoints also take gate_soft, max_prob, random, left_only, ...")  # fmt: skip
@click.option("--fast-k", type=click.IntRange(min=0), metavar="K",
              help="Candidates that a path's further heads are scored on; 0: all. Checkpoints alone: an ONNX folder "
              "has it built in. Default: the checkpoint's.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all this process may use.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(
    model: str,
    data: tuple[str, ...],
    text_field: str,
    max_length: int | None,
    stride: int | None,
    mode: str,
    fast_k: int | None,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure how well MODEL predicts a text: perplexity and top-1 accuracy of what is deployed.

    MODEL is an ONNX folder (no torch needed), a DMPT or quantized folder, or a GPT-2 folder or hub id.

    The text's non-empty lines are tokenised one by one, with one end-of-text after each. Windows of
    --max-length tokens advance by --stride; each scores its last --stride predictions, so every scored token
    has at least half a window before it. The standard error takes tokens as independent.

    \b
    Example:
      dmpt-export eval device --data wiki.test.raw
    Next: several models side by side, with their speed:
      dmpt-export compare gpt2-device device --data wiki.test.raw --out report
    """
    require(device if (Path(model) / "dmpt_manifest.json").is_file() else "train")
    from benchmarks.quality import choose_windows, evaluate, read_tokens
    from benchmarks.scorer import context_of, open_scorer
    from training.data import check_source

    for text in data:
        check_source(text)
    choose_windows(context_of(model), max_length, stride)  # refused before a large model is loaded
    scorer = open_scorer(model, threads, device, mode, dequantize=dequantize, fast_k=fast_k)
    try:
        result = evaluate(scorer, read_tokens(scorer, data, text_field), max_length, stride)
    finally:
        scorer.close()
    if as_json:
        click.echo(json.dumps({"model": model, **result.to_json()}, allow_nan=False))
    else:
        click.echo(as_text(model, result))


def dequantize(source: str | Path) -> DMPTForCausalLM:
    """A quantized folder as a torch model, for benchmarks.scorer, which does not know the format."""
    from quant.checkpoint import dequantized_model

    return dequantized_model(str(source))


def as_text(model: str, result: Quality) -> str:
    """The result for people."""
    margin = result.perplexity * result.standard_error
    lines = {
        "model": model,
        "tokens": f"{result.tokens_scored:,} scored of {result.tokens:,} "
        f"(windows of {result.max_length}, stride {result.stride})",
        "perplexity": f"{result.perplexity:.4f} ± {margin:.4f}",
        "accuracy": f"{100 * result.accuracy:.2f} %",
    }
    if len(result.route_shares) > 1:
        lines["routes"] = ", ".join(f"{leaf} {100 * share:.1f} %" for leaf, share in result.route_shares.items())
    return "\n".join(f"{key:<12}{value}" for key, value in lines.items())
