"""Draft heads on a device: exports against torch, texts equal to those without guesses, and exact sampling."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import runtime
from benchmarks.evidence import drafts as evidence
from dmpt_export.check.drafts import draft_tokens
from dmpt_export.cli.main import main
from dmpt_export.onnx.export import draft_vocabulary, export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from quant.checkpoint import save_quantized
from quant.reference import low_memory_model
from tests.helpers.models import random_calibration, random_model, saved_model
from training.checkpoints.checkpoint import save_model
from training.errors import InputError, ValidationError
from training.model.generation import DMPTForCausalLM
from training.text.tokenizer import load_tokenizer
from training.text.windows import train_tokenizer

TREES: dict[str, dict[str, Any]] = {
    "gpt2": {"splits": [], "heads": 1},
    "multi-head": {"splits": [], "heads": 3, "fast_k": 9},
    "dual": {"splits": [2], "heads": 4, "fast_k": 9},
    "dual, one head each": {"splits": [1], "heads": 2},
    "quad, one anchor": {"splits": [1, 2], "heads": 8, "fast_k": 9, "head_kind": "projected", "shared_anchor": True},
    "one anchor, all heads": {"splits": [2], "heads": 4, "head_kind": "projected", "shared_anchor": True},
}


def torch_drafts(model: DMPTForCausalLM, ids: list[int], shortlist: np.ndarray) -> np.ndarray:
    """[S, draft heads]: the likeliest token of the shortlist, by the leaf of each position."""
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids]))
        routes = model.routes(hidden.gates)[0] if hidden.gates else torch.zeros(len(ids), dtype=torch.long)
        by_leaf = [
            torch.stack([model.draft_logits(leaf, i, h[0])[:, shortlist] for i in range(model.config.next_tokens)], 1)
            for leaf, h in hidden.leaves.items()
        ]
        best = torch.stack(by_leaf)[routes, torch.arange(len(ids))].argmax(-1)
    return shortlist[best.numpy()]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    ("scheme", "size"), [("float", None), ("float", 40), ("int8", 40), ("int4-gptq", None), ("fp16", 40)]
)
def test_exports_choose_torchs_drafts_with_and_without_a_shortlist(
    tree: str, scheme: str, size: int | None, tmp_path: Path
) -> None:
    folder = source = saved_model(tmp_path / "source", **TREES[tree], next_tokens=2)
    if scheme != "float":
        folder = tmp_path / "quantized"
        save_quantized(source, folder, scheme=scheme, calibration=random_calibration(source))
    manifest = export_onnx(folder, tmp_path / "onnx", ExportOptions(draft_vocab=size))
    assert manifest["drafts"] == {"tokens": 2, "vocabulary": size or 97}
    ids = np.random.default_rng(2).integers(0, 97, 30).tolist()
    want = torch_drafts(low_memory_model(folder), ids, np.arange(size or 97))
    with runtime.load(tmp_path / "onnx") as model:
        got, _ = draft_tokens(model, ids)
    assert got.shape == want.shape
    assert (got == want).mean() >= (1.0 if scheme in ("float", "fp16") else 0.7)


@pytest.mark.parametrize("tree", TREES)
def test_an_export_without_its_draft_heads_is_that_of_the_model_without(tree: str, tmp_path: Path) -> None:
    with_heads = random_model(**TREES[tree], next_tokens=2)
    without = random_model(**TREES[tree])
    without.load_state_dict({name: t for name, t in with_heads.state_dict().items() if "draft" not in name})
    scores = []
    for name, model, options in (("a", with_heads, ExportOptions(draft_vocab=0)), ("b", without, ExportOptions())):
        save_model(model, tmp_path / name)
        manifest = export_onnx(tmp_path / name, tmp_path / f"{name}-onnx", options)
        assert "drafts" not in manifest
        assert manifest["parameters"]["total"] == without.num_parameters()
        with runtime.load(tmp_path / f"{name}-onnx") as loaded:
            scores.append(loaded.score(np.arange(40))[0])
    assert np.array_equal(*scores)


@pytest.mark.parametrize("tree", TREES)
def test_guesses_change_neither_greedy_nor_sampled_text(tree: str, tmp_path: Path) -> None:
    save_model(random_model(**TREES[tree], next_tokens=3), tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "onnx", verify=False)
    samplings: list[dict[str, Any]] = [{}, {"seed": 3}, {"seed": 4, "temperature": 0.7, "top_k": 9, "top_p": 0.8}]
    with runtime.load(tmp_path / "onnx") as model:
        for sampling, speculate in product(samplings, (1, 2, 5)):
            plain = model.generate([5, 9, 2], 40, repetition_penalty=1.1, **sampling)
            made = model.stream([5, 9, 2], 40, speculate=speculate, repetition_penalty=1.1, **sampling)
            assert [token.id for token in made] == plain
            assert made.runs + made.accepted == len(plain)  # a run gives one token, and one for each right guess
            assert made.accepted <= made.drafted <= made.runs * speculate


def test_right_guesses_save_runs(tmp_path: Path) -> None:
    """A model that always says the same thing, and whose draft heads say it too."""
    model = random_model([], 1, next_tokens=3)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        for head in model.draft_heads["root"]:
            head.weight.zero_()
    save_model(model, tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "onnx", verify=False)
    with runtime.load(tmp_path / "onnx") as loaded:
        made = loaded.stream([1, 2], 21, speculate=3)
        assert len(list(made)) == 21
    assert (made.runs, made.drafted, made.accepted) == (6, 15, 15)


def test_sampling_with_guesses_keeps_the_models_distribution(tmp_path: Path) -> None:
    """Chi-square over 20,000 pairs of tokens against the model's own softmax: the second token of each is the one that
    a guess may be right about."""
    model = random_model([1], 4, next_tokens=1, vocab_size=9, n_layer=2, n_embd=8, n_head=1, n_positions=8, fast_k=4)
    save_model(model, tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "onnx", verify=False)
    draws, counts, accepted = 20_000, Counter[tuple[int, ...]](), 0
    with runtime.load(tmp_path / "onnx", threads=1) as loaded:
        for seed in range(draws):
            made = loaded.stream([3], 3, speculate=1, seed=seed)
            counts[tuple(token.id for token in made)[:2]] += 1
            accepted += made.accepted
    assert accepted > draws / 50  # otherwise no guess was tested
    with torch.no_grad():
        first = model.log_probs(torch.tensor([[3]]), fast_k=4)[0, -1].exp().double().numpy()
        follow = (
            model.log_probs(torch.tensor([[3, token] for token in range(9)]), fast_k=4)[:, -1].exp().double().numpy()
        )
    expected = {
        pair: draws * first[pair[0]] * (1.0 if len(pair) == 1 else follow[pair])
        for pair in [(0,), *((a, b) for a in range(1, 9) for b in range(9))]  # 0 ends the text
    }
    assert sum(expected.values()) == pytest.approx(draws)
    rare = [pair for pair, n in expected.items() if n < 5]
    statistic = sum((counts[pair] - n) ** 2 / n for pair, n in expected.items() if n >= 5)
    few = sum(expected[pair] for pair in rare)
    statistic += (sum(counts[pair] for pair in rare) - few) ** 2 / few if few else 0.0
    freedom = len(expected) - len(rare)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_a_fault_in_a_draft_head_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmpt_export.graph import drafts

    source = saved_model(tmp_path / "source", [2], 4, next_tokens=2)
    right = drafts.Drafter.likeliest

    def swapped(self: drafts.Drafter, b: Any, leaf: str, h: Any) -> Any:
        return right(self, b, {"left": "right", "right": "left"}[leaf], h)

    monkeypatch.setattr(drafts.Drafter, "likeliest", swapped)
    with pytest.raises(ValidationError, match=r"draft heads: .* of the tokens differ from torch"):
        export_onnx(source, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_the_shortlist_holds_the_most_frequent_tokens_and_every_end_of_text() -> None:
    config = random_model([], 1, next_tokens=1).config
    config.eos_token_id = [96, 50]
    assert draft_vocabulary(config, 5, None).tolist() == [0, 1, 2, 50, 96]
    assert draft_vocabulary(config, 4, np.array([7, 7, 7, 3, 3, 9])).tolist() == [3, 7, 50, 96]
    assert draft_vocabulary(config, None, None).tolist() == list(range(97))
    with pytest.raises(InputError, match="draft_vocab 1 has no room for the 2 ends of text"):
        draft_vocabulary(config, 1, None)


def test_the_command_counts_a_text_and_run_reports_guesses(
    tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("the tide mill turns\n" * 50)
    assert main(["init", str(tiny_gpt2), str(tmp_path / "dmpt"), "--heads", "4", "--next-tokens", "1"]) == 0
    line = ["onnx", str(tmp_path / "dmpt"), str(tmp_path / "device"), "--kv-cache", "int8", "--draft-vocab", "12"]
    assert main([*line, "--draft-text", str(tmp_path / "text")]) == 0
    ids = np.array(load_tokenizer(tmp_path / "dmpt").encode("the tide mill turns").ids)
    graph = onnx.load(tmp_path / "device" / "model.onnx").graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == "const.draft_vocab"}
    assert set(ids) <= set(stored["const.draft_vocab"].tolist())
    capsys.readouterr()
    assert main(["run", str(tmp_path / "device"), "the tide", "-n", "12", "--speculate", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["runs"] + said["accepted"] == said["new_tokens"]
    assert said["drafted"] > 0
    assert main(["onnx", str(tiny_gpt2), str(tmp_path / "b"), "--draft-text", str(tmp_path / "text")]) == 3
    assert "--draft-text is for an export with draft heads" in capsys.readouterr().err


def test_the_evidence_script_agrees_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without guesses every run gives one token and the gain is 1; all numbers of guesses write equally much."""
    save_model(random_model([], 1, next_tokens=1, vocab_size=300), tmp_path / "source")
    (tmp_path / "text").write_text("the tide mill turns\n" * 50)
    train_tokenizer(["the tide mill turns"] * 50, 300).save(str(tmp_path / "source" / "tokenizer.json"))
    export_onnx(tmp_path / "source", tmp_path / "onnx", verify=False)
    shape = ["--prompts", "2", "--prompt-tokens", "4", "--tokens", "8", "--temperature", "0"]
    evidence.main([str(tmp_path / "onnx"), "--data", str(tmp_path / "text"), "--speculate", "0,1", *shape])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows] == ["0", "1"]
    assert (rows[0][3], rows[0][4], rows[0][6]) == ("1.000", "-", "1.000")
    assert rows[1][4].endswith("%")


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {"draft_vocab": 8}, "draft_vocab is for a model with draft heads"),
        (1, {"draft_vocab": 98}, "draft_vocab 98 is larger than the vocabulary of 97"),
    ],
)
def test_a_shortlist_that_cannot_be(n: int, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [], 1, next_tokens=n)
    with pytest.raises(InputError, match=message):
        export_onnx(source, tmp_path / "onnx", ExportOptions(**options))
