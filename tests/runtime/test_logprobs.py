"""Log-probs of tokens: those of scoring the finished text, in every way of generating it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runtime
from dmpt_export.onnx.export import export_onnx
from runtime.errors import RequestError
from runtime.generate import Generation, Generations
from runtime.model import Model
from runtime.sampling import likeliest
from runtime.writing import Token
from tests.helpers.cli import run
from tests.helpers.exports import endless_models
from tests.helpers.tolerances import TOLERANCE

FLOAT = TOLERANCE[("float32", "float")]
TREES: dict[str, dict[str, Any]] = {
    "none": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4},
    "quad": {"splits": [1, 2], "heads": 8, "fast_k": 16, "head_topk": 1},
}
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    with endless_models(tmp_path_factory.mktemp("logprobs"), TREES) as loaded:
        yield loaded


def check(model: Model, prompt: list[int], tokens: list[Token], n: int) -> None:
    """Against scoring the text; where the context is full, against scoring its last half."""
    seen = list(prompt)
    for token in tokens:
        if len(seen) > model.context:
            seen = seen[-(model.context // 2) :]
        want = model.log_probs(seen)[-1]
        assert token.logprob == pytest.approx(want[token.id], abs=FLOAT)
        assert len(token.top_logprobs) == n
        ids, values = [pair[0] for pair in token.top_logprobs], [pair[1] for pair in token.top_logprobs]
        assert len(set(ids)) == n
        np.testing.assert_allclose(values, want[ids], rtol=0, atol=FLOAT)
        np.testing.assert_allclose(values, np.sort(want)[::-1][:n], rtol=0, atol=FLOAT)
        seen.append(token.id)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"speculate": 4},
        {"on_full": "slide", "max_new_tokens": 90},
        {"on_full": "slide", "max_new_tokens": 90, "speculate": 4},
        {"temperature": 3.0, "seed": 1, "top_k": 5, "repetition_penalty": 2.0, "logit_bias": {9: 20.0}},
    ],
)
def test_they_are_those_of_scoring_the_text(tree: str, options: dict[str, Any], models: dict[str, Model]) -> None:
    """Neither penalty, bias nor temperature change them."""
    made = models[tree].stream(PROMPT, **{"max_new_tokens": 30, **options}, logprobs=3)
    assert isinstance(made, Generation)
    tokens = list(made)
    check(models[tree], PROMPT, tokens, 3)
    assert made.tokens == tokens
    assert [token.id for token in tokens] == models[tree].generate(PROMPT, **{"max_new_tokens": 30, **options})


@pytest.mark.parametrize("tree", TREES)
def test_a_list_of_prompts_has_them_for_each(tree: str, models: dict[str, Model]) -> None:
    prompts = [PROMPT, [8], list(range(1, 60))]
    made = models[tree].stream(prompts, 20, on_full="slide", seed=2, logprobs=2)
    assert isinstance(made, Generations)
    tokens = list(made)
    for row, prompt in enumerate(prompts):
        own = [token for token in tokens if token.row == row]
        check(models[tree], prompt, own, 2)
        assert made.texts[row].tokens == own
    assert models[tree].generate(prompts, 20, on_full="slide", seed=2, logprobs=2) == [t.tokens for t in made.texts]


def test_without_them_tokens_carry_none(models: dict[str, Model]) -> None:
    made = models["dual"].stream(PROMPT, 5)
    assert isinstance(made, Generation)
    assert {(token.logprob, token.top_logprobs) for token in made} == {(None, ())}
    assert made.tokens == []
    assert Token(1, "a", "left", 2) == Token(1, "a", "left", row=2, logprob=None, top_logprobs=())


def test_zero_is_the_chosen_token_alone_and_the_vocabulary_is_the_most(models: dict[str, Model]) -> None:
    model = models["dual"]
    none, whole = (model.generate(PROMPT, 4, logprobs=n) for n in (0, 97))
    for short, long in zip(none, whole, strict=True):
        assert short.top_logprobs == ()
        assert dict(long.top_logprobs)[short.id] == short.logprob == long.top_logprobs[0][1]  # greedy
        assert sorted(token for token, _ in long.top_logprobs) == list(range(97))
        assert math.fsum(math.exp(value) for _, value in long.top_logprobs) == pytest.approx(1, abs=1e-5)


@given(st.lists(st.integers(-4, 0), min_size=1, max_size=30), st.data())
def test_the_likeliest_are_the_first_of_all_in_order(values: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(0, len(values)))
    want = sorted(range(len(values)), key=lambda token: (-values[token], token))[:n]
    assert likeliest(np.array(values, np.float32), n) == tuple((token, values[token]) for token in want)


@pytest.mark.parametrize(
    ("value", "message"), [(-1, "logprobs -1"), (1.0, "logprobs 1.0"), (True, "True"), (98, "98 is above 97")]
)
def test_bad_numbers(value: Any, message: str, models: dict[str, Model]) -> None:
    for prompt in (PROMPT, [PROMPT]):
        with pytest.raises(RequestError, match=message):
            models["none"].stream(prompt, logprobs=value)


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("device") / "onnx"
    export_onnx(tiny_dmpt, out, verify=False)
    return out


def entries(model: Model, tokens: list[Token]) -> list[dict[str, Any]]:
    def entry(token: int, value: float | None) -> dict[str, Any]:
        return {"id": token, "text": model.decode([token]), "logprob": value}

    return [{**entry(t.id, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top_logprobs]} for t in tokens]


def test_json_has_an_entry_for_each_token(device: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["-n", 6, "--seed", 1, "--threads", 1, "--logprobs", 2]
    assert run("run", device, "The tide mill", *options, "--json") == 0
    got = json.loads(capfd.readouterr().out)
    with runtime.load(device, threads=1) as model:
        tokens = model.generate("The tide mill", 6, seed=1, logprobs=2)
        assert got["logprobs"] == entries(model, tokens)
    assert [entry["id"] for entry in got["logprobs"]] == got["ids"]


def test_a_batch_has_them_on_each_line(
    device: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmpt_export.cli.run.read_prompt", lambda: "stones\n\nThe wheel")
    assert run("run", device, "--batch", "-n", 6, "--threads", 1, "--logprobs", 0) == 3  # an empty line
    got = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    with runtime.load(device, threads=1) as model:
        want = model.generate(["stones", "The wheel"], 6, logprobs=0)
        assert [line.get("logprobs") for line in got] == [entries(model, want[0]), None, entries(model, want[1])]


def test_plain_text_has_no_place_for_them(device: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("run", device, "The tide mill", "--logprobs", 2) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "--logprobs prints with --json or --batch only" in err
    assert run("run", device, "The tide mill", "--json", "--logprobs", 301) == 3
    assert "logprobs 301 is above 300, the tokens of this model" in capfd.readouterr().err
