"""Documents say what is there: cited headings, links, named files, options; and the program in design.md works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import runtime
from dmpt_export.cli.main import VERBS, cli
from dmpt_export.onnx.export import export_onnx
from tests.helpers.models import saved_model
from tests.helpers.paths import REPOSITORY

CITED = re.compile(r"(docs/\w+\.md), ([A-Z][\w -]*\w)")
PACKAGES = ("benchmarks", "dmpt_export", "quant", "runtime", "training", "tests")
GUIDES = sorted(["README.md", *(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md"))])
DOCUMENTS = [*GUIDES, "RESULTS.md", "CHANGELOG.md", "SECURITY.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
NAMED = re.compile(r"(?:benchmarks|dmpt_export|docs|quant|runtime|tests|training|\.ci)/[\w./-]*|[\w-]+\.(?:toml|txt)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
NOT_FILES = {"train.txt", "test.txt", "valid.txt", "book.txt", "prompts.txt"}  # of the person who reads
NOT_OURS = {"--upgrade", "--model_args"}  # options of other programs


def read(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def anchors(document: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_cited_headings_exist() -> None:
    found = 0
    for package in PACKAGES:
        for file in (REPOSITORY / package).rglob("*.py"):
            text = " ".join(file.read_text(encoding="utf-8").split())
            for document, words in CITED.findall(text):
                headings = re.findall(r"^#+ (.+)$", read(document), re.MULTILINE)
                assert any(words.startswith(heading) for heading in headings), f"{file}: {document} has no '{words}'"
                found += 1
    assert found >= 7


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/results"])
def test_links_lead_somewhere(document: str) -> None:
    path = REPOSITORY / document
    for file in sorted(path.glob("*.md")) if path.is_dir() else [path]:
        for link in LINK.findall(file.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            if link.startswith("http"):
                continue
            there = (file.parent / target).resolve() if target else file
            assert there.exists(), f"{file}: {link}"
            assert not anchor or anchor in anchors(there), f"{file}: {link}"


@pytest.mark.parametrize("document", GUIDES)
def test_named_files_are_there(document: str) -> None:
    for span in SPAN.findall(read(document)):
        if NAMED.fullmatch(span) and span not in NOT_FILES and "NAME" not in span and "VERB" not in span:
            assert (REPOSITORY / span).exists(), f"{document} names `{span}`"


@pytest.mark.parametrize("document", GUIDES)
def test_named_options_are_options_of_a_verb(document: str) -> None:
    commands = [cli.get_command(click.Context(cli), verb) for verb in VERBS]
    known = {"--help", "--version", *NOT_OURS}
    for command in commands:
        assert command is not None
        for parameter in command.get_params(click.Context(command)):
            known |= {*parameter.opts, *parameter.secondary_opts}
    named = {option for span in SPAN.findall(read(document)) for option in OPTION.findall(span)}
    assert not named - known, document


def test_results_lists_every_entry() -> None:
    listed = {link for link in LINK.findall(read("RESULTS.md")) if link.startswith("docs/results/")}
    assert listed == {f"docs/results/{path.name}" for path in (REPOSITORY / "docs" / "results").glob("*.md")}


@pytest.mark.parametrize(("splits", "heads"), [([], 1), ([1, 2], 8)])
def test_the_program_in_design_drives_the_graph(splits: list[int], heads: int, tmp_path: Path) -> None:
    """A text in chunks and single tokens, with all routes and log-probs that the runtime gives."""
    (program,) = re.findall(r"^```python\n(.*?)^```", read("docs/design.md"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/design.md", "exec"), names)
    export_onnx(saved_model(tmp_path / "source", splits, heads, fast_k=16), tmp_path / "onnx", verify=False)
    ids = np.random.default_rng(2).integers(0, 97, 40).tolist()
    with runtime.load(tmp_path / "onnx", threads=1) as model:
        want, routes = model.log_probs(ids), model.routes(ids)
    text, at = names["Text"](tmp_path / "onnx"), 0
    for size in (7, 1, 1, 10, *[1] * 21):
        log_probs, leaves = text.feed(ids[at : at + size], last=size)
        np.testing.assert_allclose(log_probs, want[at : at + size], rtol=0, atol=1e-4)
        assert leaves == routes[at : at + size]
        at += size
    assert at == len(ids)
    assert not splits or len(set(routes)) > 1
