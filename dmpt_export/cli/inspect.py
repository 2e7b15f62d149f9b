"""`dmpt-export inspect`: show the parts of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.extras import require
from dmpt_export.requests.sources import check_model, is_exported
from training.errors import OptionError
from training.text.named import named_texts

if TYPE_CHECKING:
    from benchmarks.quality.by_domain import DomainQuality


@click.command("inspect", short_help="Show a model's tree, parts, sizes and bits.")
@click.argument("model")
@click.option("--data", metavar="FILE", help="Text to measure path usage and head weights on.")
@click.option("--domain", multiple=True, metavar="NAME=FILE", help="Text of one domain: its paths and perplexity, as "
              "eval --domain on its first 4096 tokens.")  # fmt: skip
@click.option("--picture", type=click.Path(dir_okay=False), metavar="FILE.svg", help="Draw the domains to this file.")
@click.option("--all", "full", is_flag=True, help="Show each tensor and operator too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with everything.")
def command(
    model: str, data: str | None, domain: tuple[str, ...], picture: str | None, full: bool, as_json: bool
) -> None:
    """Show the parts of MODEL: the tree of paths, parameters, bytes and bits of each part, and how much is stored in
    which form; with --all each tensor and, for an ONNX folder, its operators; with --data also path usage and head
    weights on a text's first 4096 tokens; with --domain which paths each domain of text takes.

    MODEL is a DMPT folder, a quantized folder, an ONNX folder, or a GPT-2 folder or hub id; an ONNX folder
    is read without torch.

    \b
    Example:
      dmpt-export inspect device --data test.txt
      dmpt-export inspect tuned --domain code=code.txt --domain prose=prose.txt --picture paths.svg
    """
    if picture is not None and not domain:
        raise OptionError("{picture} draws domains: give {domain} NAME=FILE for each")
    domains = named_texts(domain)
    exported, scored = is_exported(model), bool(data is not None or domain)
    require(*([] if exported else ["train"]), *(["cpu"] if exported and scored else []))
    if scored:
        from training.text.sources import check_source

        for text in ([] if data is None else [data], *domains.values()):
            for file in text:
                check_source(file)
    if not exported:
        from training.progress import say

        check_model(model)
        say("loading PyTorch")
    from benchmarks.report.domains import domain_table
    from dmpt_export.inspect.summary import as_text, summarise, usage_lines

    summary = summarise(model)
    used = follow(model, data) if data is not None else None
    found = compare_domains(model, domains) if domains else {}
    if picture is not None:
        draw(picture, summary["name"], found)
    if as_json:
        more = {"usage": used, "domains": {name: one.to_json() for name, one in found.items()}}
        click.echo(json.dumps({**summary, **{key: value for key, value in more.items() if value}}))
    else:
        lines = [as_text(summary, full=full), *(["", *usage_lines(used)] if used else [])]
        click.echo("\n".join([*lines, *(["", domain_table(found)] if found else [])]))


def compare_domains(model: str, domains: dict[str, list[str]]) -> dict[str, DomainQuality]:
    """benchmarks.quality.by_domain on the first tokens of each domain's text."""
    from benchmarks.quality.by_domain import by_domain
    from benchmarks.quality.open_scorer import open_scorer
    from benchmarks.quality.path_usage import MOST
    from benchmarks.quality.perplexity import evaluate, read_tokens
    from benchmarks.quality.scorer import domains_of_source

    scorer = open_scorer(model)
    alone = None if is_exported(model) else lambda leaf: open_scorer(model, mode=f"{leaf}_only")
    try:
        served = domains_of_source(model)
        return by_domain(
            scorer, alone, served, domains, lambda one, files: evaluate(one, read_tokens(one, files)[:MOST])
        )
    finally:
        scorer.close()


def draw(file: str, name: str, found: dict[str, DomainQuality]) -> None:
    from benchmarks.report.domains import picture
    from training.checkpoints.atomic import atomic_file

    with atomic_file(Path(file)) as tmp:
        tmp.write_text(picture(name, found), encoding="utf-8")


def follow(model: str, text: str) -> dict[str, Any]:
    """benchmarks.quality.path_usage of a model on a text."""
    from benchmarks.quality.open_scorer import open_scorer
    from benchmarks.quality.path_usage import MOST, usage
    from training.text.windows import check_vocabulary, first_tokens

    scorer = open_scorer(model)
    try:
        check_vocabulary(scorer.tokenizer, scorer.vocab_size, scorer.folder)
        return usage(scorer, first_tokens(Path(text), scorer.tokenizer, scorer.end_of_text, MOST))
    finally:
        scorer.close()
