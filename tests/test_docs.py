"""Documents that code cites are there, under the headings it names."""

from __future__ import annotations

import re

from tests.helpers.paths import REPOSITORY

CITED = re.compile(r"(docs/\w+\.md), ([A-Z][\w -]*\w)")
PACKAGES = ("benchmarks", "dmpt_export", "quant", "runtime", "training", "tests")


def test_cited_headings_exist() -> None:
    found = 0
    for package in PACKAGES:
        for file in (REPOSITORY / package).rglob("*.py"):
            text = " ".join(file.read_text(encoding="utf-8").split())
            for document, words in CITED.findall(text):
                headings = re.findall(r"^#+ (.+)$", (REPOSITORY / document).read_text(encoding="utf-8"), re.MULTILINE)
                assert any(words.startswith(heading) for heading in headings), f"{file}: {document} has no '{words}'"
                found += 1
    assert found >= 7
