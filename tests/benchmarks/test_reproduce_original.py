"""The script that reproduces the original's table, run on local stand-ins of the same formats."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_hub import write_wikitext
from tests.helpers.paths import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "reproduce_original.sh"
SMALL = "--max_steps 1 --batch_size 2 --grad_accum_steps 1 --max_length 16 --eval_max_tokens 100 --cpu".split()


@pytest.fixture
def workplace(make_gpt2: Callable[..., Any], tmp_path: Path) -> Path:
    make_gpt2(tmp_path / "gpt2", n_layer=12, n_embd=16, n_head=2)
    return tmp_path


def run(workplace: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The documented command in `workplace`, with options that make it short."""
    own = {"DMPT": f"{sys.executable} -m dmpt_export", "XDG_CACHE_HOME": str(workplace / "cache")}
    own |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(workplace / "hf"), "PYTHONWARNINGS": "ignore"}
    own |= {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        ["sh", str(SCRIPT), "out", *SMALL],
        cwd=workplace, env=os.environ | own | environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip


def check(workplace: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table by name, checked to be comparable."""
    report = json.loads((workplace / "out" / "report" / "comparison.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["published", "control", "dmpt"]
    assert [name for name, row in rows.items() if row["control"]] == ["control"]
    assert len({row["tokens_sha256"] for row in rows.values()}) == 1
    assert rows["published"]["parameters"] == rows["control"]["parameters"] < rows["dmpt"]["parameters"]
    spent = []
    for name in ("control", "dmpt"):
        states = sorted((workplace / "out" / name).glob("phase-*/last/trainer_state/state.json"))
        spent.append([(s["position"], s["data"]) for s in map(json.loads, map(Path.read_text, states))])
    assert spent[0] == spent[1]
    assert len(spent[0]) == 4
    return rows


def test_the_script_makes_the_table_from_local_files(workplace: Path, sample_text: str) -> None:
    names = {"TRAIN": "wiki.train.raw", "VALID": "wiki.valid.raw", "TEST": "wiki.test.raw"}
    for name in names.values():
        (workplace / name).write_text(sample_text.replace("mill", name) * 2, encoding="utf-8")
    done = run(workplace, **names)
    assert done.returncode == 0, done.stderr
    rows = check(workplace)
    assert rows["published"]["perplexity"] != rows["control"]["perplexity"]
    assert "DMPT against GPT-2 trained on the same 128 tokens" in done.stdout
    again = run(workplace, **names)
    assert again.returncode == 0, again.stderr
    assert [row["perplexity"] for row in check(workplace).values()] == [row["perplexity"] for row in rows.values()]


def test_the_script_as_documented_with_a_copy_of_the_hubs_dataset(workplace: Path, sample_text: str) -> None:
    """Nothing named: `gpt2` and `Salesforce/wikitext` are found as folders, laid out as on the hub."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed: pip install 'dmpt-export[data]'")
    write_wikitext(workplace / "Salesforce" / "wikitext", [f"{line}\n" for line in sample_text.split("\n")])
    done = run(workplace)
    assert done.returncode == 0, done.stderr
    check(workplace)
    assert (workplace / "out" / "report" / "comparison.svg").is_file()
