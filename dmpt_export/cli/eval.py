"""`dmpt-export eval`: perplexity and accuracy of a model on a text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.cli.checks import TableChoice, no_verify, protocols
from dmpt_export.requests.eval import EvaluateRequest

if TYPE_CHECKING:
    from benchmarks.quality.perplexity import Quality


@click.command("eval", short_help="Measure perplexity and accuracy on a text.")
@click.argument("model")
@click.option("--data", multiple=True, metavar="FILE",
              help="Text: plain, JSONL (both also .xz, .gz, .zst), Parquet, or a hub dataset such as "
              "wikitext-103:test. Several are scored as one text.")  # fmt: skip
@click.option("--domain", multiple=True, metavar="NAME=FILE",
              help="Instead of --data: text of one domain. Each domain is scored alone, on checkpoints also on every "
              "path alone.")  # fmt: skip
@click.option("--text-field", default="text", show_default=True, metavar="NAME",
              help="Where the text is in JSONL, Parquet and datasets.")  # fmt: skip
@click.option("--protocol", type=TableChoice("protocol", protocols), default="stride-concat", show_default=True,
              help="What is scored after what; see above.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2), metavar="N",
              help="Window length in tokens. Default: 1024, or the model's context if that is less.")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), metavar="N",
              help="Predictions scored in each window. Default: half a window, or all of a disjoint one.")  # fmt: skip
@click.option("--mode", default="gate_hard", show_default=True,
              help="Path mode; checkpoints also take gate_soft, max_prob, random, left_only, ...")  # fmt: skip
@click.option("--fast-k", type=click.IntRange(min=0), metavar="K",
              help="Candidates that a path's further heads are scored on; 0: all. Only for checkpoints: in an ONNX "
              "folder it is fixed. Default: the checkpoint's.")  # fmt: skip
@click.option("--base", metavar="OTHER", help="Also measure KL(OTHER || MODEL), agreement and the ratio of "
              "perplexities; OTHER is any model with the same tokenizer.")  # fmt: skip
@click.option("--base-cache", type=click.Path(file_okay=False), metavar="FOLDER",
              help="Cache OTHER's log-probs there, 2 bytes each (28 GB for WikiText's test text and GPT-2), "
              "so that OTHER runs only once for several models.")  # fmt: skip
@click.option("--resume", type=click.Path(file_okay=False), metavar="FOLDER",
              help="Store the state there; a killed evaluation, run again, continues and gives the same "
              "digits.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True,
              help="Windows that a checkpoint runs together; for --device cuda.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all available to this process.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@no_verify
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool, **fields: Any) -> None:
    """Measure how well MODEL predicts a text: perplexity and accuracy of the deployed model.

    MODEL is an ONNX folder (no torch needed), a DMPT or quantized folder, or a GPT-2 folder or hub id.

    Protocols. stride-concat: the text's non-empty lines are tokenised one by one, with one end-of-text after each;
    windows of --max-length tokens advance by --stride, and each scores its last --stride predictions, so every scored
    token has at least half a window before it. sliding: as in Hugging Face's guide, the lines are joined by a blank
    line without end-of-text, and the first window scores all its predictions. non-overlapping: the same text in
    windows that do not overlap.

    Perplexities of different protocols or windows do not compare: only stride-concat counts the end-of-text tokens,
    and tokens have different amounts of context.

    Perplexity per word and bits per byte count the text that the scored tokens stand for, end-of-text as one newline,
    so they compare between tokenizers. Standard errors treat tokens as independent.

    \b
    Example:
      dmpt-export eval device --data wiki.test.raw
      dmpt-export eval device --data wiki.test.raw --base tuned --resume progress
      dmpt-export eval tuned --domain code=code.txt --domain prose=prose.txt
    Next: compare several models, including their speed:
      dmpt-export compare gpt2-device device --data wiki.test.raw --out report
    """
    request = EvaluateRequest(**fields)
    request.check()
    found = request.run()
    if found.quality is None:
        from benchmarks.report.domains import domain_table

        domains = {name: one.to_json() for name, one in found.domains.items()}
        shown = json.dumps({"model": request.model, "domains": domains}, allow_nan=False)
        click.echo(shown if as_json else domain_table(found.domains))
    elif as_json:
        click.echo(json.dumps({"model": request.model, **found.quality.to_json()}, allow_nan=False))
    else:
        click.echo(as_text(request.model, found.quality, found.several_heads))


def as_text(model: str, result: Quality, several_heads: bool = False) -> str:
    """The result as text. several_heads: whether a path of the model has several heads."""
    from benchmarks.report.table import readable

    lines = {
        "model": model,
        "tokens": f"{result.tokens_scored:,} scored of {result.tokens:,} "
        f"({result.protocol}, windows of {result.max_length}, stride {result.stride})",
        "perplexity": f"{result.perplexity:.4f} ± {result.perplexity * result.standard_error:.4f}",
    }
    if result.word_perplexity is not None and result.bits_per_byte is not None:
        lines["per word"] = f"{readable(result.word_perplexity)} ({result.words_scored:,} words)"
        lines["per byte"] = f"{result.bits_per_byte:.4f} bits ({result.bytes_scored:,} bytes)"
    lines["accuracy"] = f"{100 * result.accuracy:.2f} %"
    if result.top5_accuracy is not None:
        lines["accuracy"] += f", among the top five {100 * result.top5_accuracy:.2f} %"
    if len(result.route_shares) > 1:
        lines |= paths(result)
    for leaf, shares in (result.head_shares or {}).items():
        if len(shares) > 1:
            lines[f"heads {leaf}"] = ", ".join(f"{head}: {100 * weight:.1f} %" for head, weight in shares.items())
    if several_heads and result.head_shares is None:
        lines["heads"] = "not available: re-export the model, or use a mode that takes one path per token"
    if result.base:
        lines |= against(result.base)
    return "\n".join(f"{key:<11} {value}" for key, value in lines.items())


def paths(result: Quality) -> dict[str, str]:
    """Each path's share of the tokens, and its perplexity there."""
    lines = {"routes": ", ".join(f"{leaf} {100 * share:.1f} %" for leaf, share in result.route_shares.items())}
    if result.switch_share is not None:
        lines["switches"] = f"{100 * result.switch_share:.1f} % of tokens take a different path from the token before"
    own = ", ".join(f"{leaf} {perplexity:.2f}" for leaf, perplexity in result.path_perplexity.items())
    lines["on each"] = f"perplexity {own}"
    return lines


def against(base: dict[str, Any]) -> dict[str, str]:
    """The comparison with --base."""
    return {
        "base": f"{base['model']}, perplexity {base['perplexity']:.4f}",
        "KL": f"mean {max(base['kl_mean'], 0):.6f} ± {base['kl_mean_error']:.6f}, "
        f"median {max(base['kl_median'], 0):.6f}, 99 % {base['kl_99']:.6f}, largest {base['kl_max']:.4f}",
        "same top": f"{100 * base['top1_agreement']:.2f} ± {100 * base['top1_agreement_error']:.2f} %",
        "ln ratio": f"{base['log_ratio']:+.6f} ± {base['log_ratio_error']:.6f} of perplexity to the base's",
    }
