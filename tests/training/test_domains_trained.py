"""Training with domains of text, given or learned: what gates learn, resuming, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoints import edit_config
from tests.helpers.cli import run
from tests.helpers.models import random_model
from tests.helpers.training_runs import LENGTH, interrupted_at, metrics, options, some_tokens
from training.checkpoints.checkpoint import load_model
from training.errors import InputError
from training.loop.clusters import k_means, learn_domains, nearest, trunk_mean
from training.loop.state import saved_domains
from training.loop.trainer import train
from training.text.domains import Domains, joined

# --- learned domains ------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(2, 5), st.integers(0, 100))
def test_k_means_finds_groups_that_are_far_apart(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(12 * count) % count
    points = 100.0 * torch.eye(count, 6)[groups] + torch.randn(12 * count, 6, generator=generator)
    own = nearest(points, k_means(points, count, seed))
    assert len({*zip(own.tolist(), groups.tolist(), strict=True)}) == count  # one cluster for each group


def test_k_means_of_fewer_points_than_clusters_ends() -> None:
    assert torch.isfinite(k_means(torch.ones(5, 3), 4, 0)).all()


def test_learned_domains_are_the_clusters_of_mean_trunk_outputs() -> None:
    model, tokens = random_model([2], 4), some_tokens(40 * LENGTH + 5)
    domains = learn_domains(model, tokens, LENGTH, 2, seed=0)
    assert domains.names == ("learned-1", "learned-2")
    labels = domains.of_windows(40, LENGTH)
    assert 20 <= (labels == 0).sum() < 40  # the larger one first
    rows = torch.from_numpy(tokens[: 40 * LENGTH].reshape(40, LENGTH).astype(np.int64))
    with torch.no_grad():
        points = trunk_mean(model, rows)
    centres = torch.stack([points[torch.from_numpy(labels) == i].mean(0) for i in (0, 1)])
    assert nearest(points, centres).tolist() == labels.tolist()
    with pytest.raises(InputError, match="needs as many training sequences, there are 1"):
        learn_domains(model, tokens[: LENGTH + 1], LENGTH, 2, seed=0)


# --- training -------------------------------------------------------------------------------------------


def two_texts() -> tuple[np.ndarray, Domains]:
    """Two languages: even tokens and odd tokens."""
    half = some_tokens(40 * LENGTH) % 96 // 2
    return joined([("even", 2 * half), ("odd", 2 * half + 1)])


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    tokens, domains = two_texts()
    setting = options(max_steps=7, lb_coef=0.1, domain_coef=0.5)
    whole, parts = random_model([2], 4), random_model([2], 4)
    train(whole, tokens, setting, tmp_path / "whole", domains=domains)
    interrupted_at(parts, tmp_path / "parts", 3, setting, tokens, domains=domains)
    parts = load_model(tmp_path / "parts" / "last")
    train(parts, tokens, setting, tmp_path / "parts", resume=True, domains=domains)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    numbers = [[r["as_taught"], r["domain"], r["lb"]] for r in metrics(tmp_path / "whole")]
    assert numbers == [[r["as_taught"], r["domain"], r["lb"]] for r in metrics(tmp_path / "parts")]
    assert len(numbers) == 7
    with pytest.raises(InputError, match="domains of the training data was"):
        train(parts, tokens, setting, tmp_path / "parts", resume=True)
    parts.config.domains = {"even": "right", "odd": "left"}
    with pytest.raises(InputError, match="domains of the training data was"):
        train(parts, tokens, setting, tmp_path / "parts", resume=True, domains=domains)


@pytest.mark.usefixtures("one_thread")
def test_gates_learn_to_tell_domains_apart(tmp_path: Path) -> None:
    tokens, domains = two_texts()
    model, out = random_model([2], 4), tmp_path / "run"
    setting = options(max_steps=160, lr=3e-3, gate_lr=1e-2, domain_coef=1.0, dropout=0.0, log_every=20)
    train(model, tokens, setting, out, domains=domains)
    assert model.config.domains == {"even": "left", "odd": "right"}
    shares = [record["as_taught"] for record in metrics(out)]
    assert shares[0] < 0.75
    assert shares[-1] > 0.9
    windows = torch.from_numpy(tokens.astype(np.int64)).view(2, -1, LENGTH)
    for domain in (0, 1):
        routes = model.routes(model.hidden(windows[domain]).gates)
        assert (routes == domain).float().mean() > 0.9


# --- the command line -----------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path, sample_text: str) -> dict[str, str]:
    out = {}
    for name, text in (("prose", sample_text), ("code", "x = 1\n" * 200), ("nothing", "")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        out[name] = str(tmp_path / f"{name}.txt")
    return out


SMALL = ["--max-steps", 2, "--max-length", 16, "--batch-size", 2, "--grad-accum-steps", 1, "--log-every", 1, "--cpu"]


def test_domains_of_the_command_line_reach_the_model_and_its_run(
    tiny_dmpt: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, domain_map = tmp_path / "out", tmp_path / "map.json"
    domain_map.write_text('{"prose": "right", "code": [0]}')
    given = ["--domain", f"prose={texts['prose']}", "--domain", f"code={texts['code']}", "--data", texts["prose"]]
    assert run("train", tiny_dmpt, out, *given, "--domain-map", domain_map, *SMALL) == 0
    assert load_model(out).config.domains == {"prose": "right", "code": [0]}
    about = json.loads((out / "last" / "trainer_state" / "state.json").read_text())["about"]
    assert about["domains"] == {"prose": [texts["prose"]], "code": [texts["code"]]}
    assert {"domain", "domain.left", "as_taught"} <= metrics(out)[-1].keys()
    assert run("train", "--resume", out, "--max-steps", 3) == 0  # the texts are the run's
    assert metrics(out)[-1]["step"] == 3
    assert load_model(out).config.domains == {"prose": "right", "code": [0]}
    domain_map.write_text('{"prose": "left", "code": [0]}')
    assert run("train", "--resume", out, "--max-steps", 4, "--domain-map", domain_map) == 3
    assert "domains of the training data was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--domain", "prose"], 2, "NAME=FILE"),
        (["--domain", "a b={prose}"], 2, "letters, digits"),
        (["--domain", "a={prose}"], 3, "one --domain would be served by everything"),
        (["--domain", "a={missing}"], 3, "does not exist"),
        (["--domain", "a={nothing}"], 3, "is empty"),
        (["--domain", "a={prose}", "--domain", "b={code}", "--domain", "c={code}"], 3, "only 2 paths"),
        (["--domain", "a={prose}", "--learn-domains", "2"], 2, "--learn-domains is for text without domains"),
        (["--data", "{prose}", "--learn-domains", "1"], 2, "x>=2"),
        (["--data", "{prose}", "--learn-domains", "3"], 3, "only 2 paths"),
        (["--data", "{prose}", "--domain-map", "{map}"], 2, "--domain-map is for text with domains"),
        (["--domain", "other={prose}", "--domain-map", "{map}"], 3, "does not say what serves 'other'"),
        (["--domain", "prose={prose}", "--domain-map", "{map}"], 3, "names 'code', and no --domain"),
        (["--domain", "prose={prose}", "--domain", "code={code}", "--domain-map", "{wrong}"], 3, "no path 'middle'"),
        (["--domain", "prose={prose}", "--domain-map", "{form}"], 3, "name of a path or a list of heads"),
    ],
)
def test_domains_that_cannot_be_taught_are_refused_in_one_line(
    tiny_dmpt: Path,
    texts: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    maps = {
        "map": {"prose": "left", "code": "right"},
        "wrong": {"prose": "left", "code": "middle"},
        "form": {"prose": 1},
    }
    for name, content in maps.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    places = {**texts, "missing": "no.txt", **{name: str(tmp_path / f"{name}.json") for name in maps}}
    filled = [argument.format(**places) for argument in arguments]
    assert run("train", tiny_dmpt, tmp_path / "out", *filled, *SMALL) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_learned_domains_stay_those_of_the_runs_start(tiny_dmpt: Path, texts: dict[str, str], tmp_path: Path) -> None:
    """Also where the run is resumed with more steps, and in every phase of a recipe."""
    out, given = tmp_path / "out", ["--data", texts["prose"], "--data", texts["code"], "--learn-domains", 2]
    assert run("train", tiny_dmpt, out, *given, *SMALL) == 0
    names = ("learned-1", "learned-2")
    kept = saved_domains(out, names)
    assert run("train", "--resume", out, "--max-steps", 40) == 0
    after = saved_domains(out, names)
    assert kept is not None
    assert after is not None
    assert after.crc32() == kept.crc32()
    assert metrics(out)[-1]["as_taught"] > 0
    assert run("train", "--resume", out, "--max-steps", 41, "--learn-domains", 3) == 3

    recipe, phases = tmp_path / "two.json", tmp_path / "phases"
    recipe.write_text(json.dumps({"about": "a test", "phases": [{"max_length": 16}, {"max_length": 8}]}))
    assert run("train", tiny_dmpt, phases, *given, *SMALL[:2], "--batch-size", 2, "--cpu", "--recipe", recipe) == 0
    for number in (1, 2):
        own = saved_domains(phases / f"phase-{number}", names)
        assert own is not None
        assert own.crc32() == kept.crc32()


def test_a_new_domain_does_not_take_the_path_of_another(
    dmpt_copy: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(dmpt_copy, domains={"prose": "right", "code": "left"})
    given = ["--domain", f"code={texts['code']}"]
    assert run("train", dmpt_copy, tmp_path / "out", *given, *SMALL) == 0
    assert load_model(tmp_path / "out").config.domains == {"prose": "right", "code": "left"}
    given += ["--domain", f"more={texts['prose']}"]
    assert run("train", dmpt_copy, tmp_path / "other", *given, *SMALL) == 3
    assert "was taught the domains prose, code and not 'more': say with --domain-map" in capsys.readouterr().err


def test_a_model_of_one_path_and_head_has_nothing_to_serve_domains(
    tiny_gpt2: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--domain", f"a={texts['prose']}", "--domain", f"b={texts['code']}"]
    assert run("train", tiny_gpt2, tmp_path / "out", *given, *SMALL) == 3
    assert "one path and one head" in capsys.readouterr().err
