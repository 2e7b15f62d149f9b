"""Domains of text: which sequences have which, what serves them, the losses against plain references, and training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoints import edit_config
from tests.helpers.cli import run
from tests.helpers.models import random_model
from tests.helpers.tolerances import TOLERANCE
from tests.helpers.training_runs import LENGTH, interrupted_at, metrics, options, some_tokens
from training.checkpoints.checkpoint import load_model
from training.errors import InputError
from training.loop import losses
from training.loop.clusters import k_means, learn_domains, nearest, trunk_mean
from training.loop.objective import Objective
from training.loop.options import TrainOptions
from training.loop.state import saved_domains
from training.loop.trainer import train
from training.loop.watch import Meter
from training.model.domains import even_domains, heads_of, leaves_of
from training.model.shape import build_tree, even_allocation, leaf_names
from training.text.batches import TokenBatches
from training.text.domains import NONE, Domains, joined

CLOSE = {"abs": TOLERANCE["float64", "loss"]}
ATOL = TOLERANCE["float32", "loss"]
IDS = torch.randint(0, 97, (4, 13), generator=torch.Generator().manual_seed(3))
OWN = torch.tensor([0, 1, NONE, 0])  # the domains of these sequences


def only_domains(**more: Any) -> TrainOptions:
    off = {"lb_coef": 0.0, "gold_aux_coef": 0.0, "tether_coef": 0.0, "domain_coef": 1.0}
    return TrainOptions(**{"train_path_selection": "gate_expected", **off, **more})


# --- which text is of which domain ----------------------------------------------------------------------


@example([(1, 0), (1, 1), (1, 0)], 3)
@example([(1, 0), (2, 0)], 3)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(NONE, 2)), min_size=1, max_size=6), st.integers(1, 7))
def test_a_window_has_the_domain_of_all_its_tokens_or_none(pieces: list[tuple[int, int]], length: int) -> None:
    labels = [label for tokens, label in pieces for _ in range(tokens)]
    count = len(labels) // length
    windows = [set(labels[i * length : (i + 1) * length]) for i in range(count)]
    expected = [window.pop() if len(window) == 1 else NONE for window in windows]
    assert Domains.of("abc", pieces).of_windows(count, length).tolist() == expected


def test_texts_are_joined_with_their_domains() -> None:
    tokens, domains = joined([(None, np.arange(3)), ("b", np.arange(2)), ("a", np.arange(4)), ("b", np.arange(1))])
    assert tokens.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert domains.names == ("b", "a")
    assert (domains.ends.tolist(), domains.labels.tolist()) == ([3, 5, 9, 10], [NONE, 0, 1, 0])
    with pytest.raises(InputError, match="belong to another text"):
        domains.of_windows(3, 4)
    with pytest.raises(InputError, match="domain 'b' has no text"):
        joined([("a", np.arange(4)), ("b", np.arange(0))])


def test_sequences_keep_their_domains_in_every_pass() -> None:
    batches = TokenBatches(np.arange(8 * 5 + 1), 5, seed=1)
    batches.labels = np.arange(8).astype(np.int16)
    for position in (0, 6, 13):
        ids, labels = batches.take(position, 8), batches.domains(position, 8)
        assert labels is not None
        assert (ids[:, 0] // 5).tolist() == labels.tolist()


# --- what serves a domain -------------------------------------------------------------------------------


@given(st.integers(1, 3), st.data())
def test_by_default_every_path_serves_one_domain(depth: int, data: st.DataObject) -> None:
    leaves = leaf_names(list(range(1, depth + 1)), depth + 1)
    names = [f"d{i}" for i in range(data.draw(st.integers(2, len(leaves))))]
    allocation = even_allocation(leaves, 2 * len(leaves))
    served = even_domains(names, allocation)
    assert list(served) == names
    assert sorted(leaf for one in served.values() for leaf in leaves_of(one, allocation)) == sorted(leaves)


def test_heads_serve_a_domain_with_the_leaves_that_have_them() -> None:
    allocation = {"left": [0, 1, 2], "right": [3, 1]}
    assert leaves_of([1], allocation) == ["left", "right"]
    assert leaves_of([3], allocation) == ["right"]
    assert heads_of([1, 2], allocation) == {"left": [1, 2], "right": [1]}
    assert heads_of("left", allocation) == {}


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"a": "middle"}, "there is no path 'middle', choose one of left, right"),
        ({"a": [0, 9]}, "at least one of 0, 1, 2, 3"),
        ({"a": []}, "at least one of 0, 1, 2, 3"),
        ({"a b": "left"}, "letters, digits"),
    ],
)
def test_a_domain_that_nothing_serves_is_refused(domains: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_model([2], 4, domains=domains)


def test_the_field_survives_a_checkpoint(tmp_path: Path) -> None:
    from training.checkpoints.checkpoint import read_config, save_model

    domains: dict[str, Any] = {"code": "left", "prose": [2, 3]}
    save_model(random_model([2], 4, domains=domains), tmp_path / "model")
    assert read_config(tmp_path / "model").domains == domains
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()) | {"domains": {"code": 1}})
    )
    with pytest.raises(InputError, match="domains must be an object"):
        read_config(tmp_path / "model")


# --- the losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_taught_is_the_mean_log_weight_of_what_serves(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = F.log_softmax(torch.randn(3, 5, 4, generator=generator, dtype=torch.float64), -1)
    serves = torch.tensor([[True, False, True, False], [False] * 4, [False, True, False, False]])
    weight = torch.rand(3, 5, generator=generator, dtype=torch.float64) if weighted else torch.ones(3, 5).double()
    total, norm = 0.0, 0.0
    for b, t in np.ndindex(3, 5):
        mine = [math.exp(log_p[b, t, c]) for c in range(4) if serves[b, c]]
        if mine:
            total -= weight[b, t].item() * math.log(math.fsum(mine))
            norm += weight[b, t].item()
    assert losses.taught(log_p, serves, weight).item() == pytest.approx(total / norm, **CLOSE)


def test_taught_without_anything_to_teach_is_zero_with_a_finite_gradient() -> None:
    log_p = torch.full((2, 3, 2), -math.inf, requires_grad=True)
    loss = losses.taught(log_p, torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert log_p.grad is not None
    assert torch.equal(log_p.grad, torch.zeros(2, 3, 2))


def test_balance_of_some_sequences_is_that_of_a_batch_of_them() -> None:
    generator = torch.Generator().manual_seed(2)
    gates = {name: F.log_softmax(torch.randn(4, 5, 2, generator=generator), -1) for name in ("root", "left", "right")}
    mask, counted = torch.rand(4, 5, generator=generator) < 0.7, torch.tensor([True, False, True, False])
    tree = build_tree([1, 2], 3)
    expected = losses.load_balance({name: w[counted] for name, w in gates.items()}, tree, mask[counted])
    got = losses.load_balance(gates, tree, mask, counted=counted)
    assert got.item() == pytest.approx(expected.item(), abs=ATOL)
    root = losses.load_balance(gates, tree, mask, nodes=["root"])
    assert root.item() == pytest.approx(losses.load_balance({"root": gates["root"]}, tree, mask).item(), abs=ATOL)


@pytest.mark.parametrize(
    ("splits", "domains"),
    [
        ([2], {"a": "left", "b": "right"}),
        ([1, 2], {"a": "left", "b": "right_left"}),
        ([1, 2], {"a": "root", "b": "right"}),
        ([2], {"a": "left", "b": [5, 7]}),
        ([], {"a": [0, 1], "b": [2]}),
    ],
    ids=["dual", "quad", "all leaves", "heads", "heads of one path"],
)
def test_the_domain_terms_are_those_of_the_models_own_gates(splits: list[int], domains: dict[str, Any]) -> None:
    model = random_model(splits, 8, domains=domains)
    hidden, allocation = model.hidden(IDS[:, :-1]), model.config.head_allocation
    expected: dict[str, float] = {}
    if splits:
        weights = {leaf: w.exp() for leaf, w in model.path_log_weights(hidden.gates).items()}
        per_token = [
            -math.log(math.fsum(weights[leaf][b, t].item() for leaf in leaves_of(domains["ab"[OWN[b]]], allocation)))
            for b, t in np.ndindex(4, 12) if OWN[b] != NONE
        ]  # fmt: skip
        expected["domain"] = math.fsum(per_token) / len(per_token)
    for leaf, h in hidden.leaves.items():
        total, norm = 0.0, 0.0
        for b, t in np.ndindex(4, 12):
            places = heads_of(domains["ab"[OWN[b]]], allocation).get(leaf) if OWN[b] != NONE else None
            if places:
                weight = weights[leaf][b, t].item() if splits else 1.0
                pi = model.head_log_weights(leaf, h)[b, t].exp()
                total -= weight * math.log(pi[places].sum().item())
                norm += weight
        if norm:
            expected[f"domain.{leaf}"] = total / norm
    loss = Objective(model, only_domains(), domains=("a", "b"))(IDS, domains=OWN)
    found = {name: value.item() for name, value in loss.terms.items() if name.startswith("domain")}
    assert found == pytest.approx(expected, abs=1e-5)
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_balance_counts_within_each_domain_where_it_may_choose() -> None:
    """Domain a has all leaves under left, b one leaf: left is balanced for a, nothing for b, all for the rest."""
    model = random_model([1, 2], 8, domains={"a": "left", "b": "right_right"})
    gates = model.hidden(IDS[:, :-1]).gates
    log_gates = {name: F.log_softmax(g / model.config.gate_temp, -1) for name, g in gates.items()}
    some = {label: label == OWN for label in (0, NONE)}
    expected = sum(
        share * losses.load_balance({n: w[some[label]] for n, w in log_gates.items()}, model.tree, nodes=nodes).item()
        for label, share, nodes in ((0, 0.5, ["left"]), (NONE, 0.25, None))
    )
    loss = Objective(model, only_domains(lb_coef=1.0), domains=("a", "b"))(IDS, domains=OWN)
    assert loss.terms["lb"].item() == pytest.approx(expected, abs=ATOL)


def test_masked_tokens_and_tokens_without_a_domain_teach_nothing() -> None:
    model = random_model([2], 4, domains={"a": "left", "b": "right"})
    objective = Objective(model, only_domains(), domains=("a", "b"))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[2] = True
    loss = objective(IDS, mask, OWN)
    assert loss.terms["domain"].item() == 0.0
    own = objective(IDS[:1], domains=OWN[:1]).terms["domain"].item()
    mask[0] = True
    assert objective(IDS, mask, OWN).terms["domain"].item() == pytest.approx(own, abs=ATOL)


def test_a_text_without_domains_has_the_loss_it_had() -> None:
    model = random_model([2], 4)
    plain = Objective(model, only_domains(lb_coef=0.1))(IDS)
    assert set(plain.terms) == {"nll", "lb"}


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


def test_passes_without_a_domain_do_not_change_what_is_taught() -> None:
    model = random_model([2], 4, domains={"a": "left", "b": "right"})
    objective, meter, alone = Objective(model, only_domains(), domains=("a", "b")), Meter(), Meter()
    for own, meters in ((OWN, (meter, alone)), (torch.full((4,), NONE), (meter,))):
        loss = objective(IDS, domains=own)
        for one in meters:
            one.add(loss)
    assert meter.means()["as_taught"] == alone.means()["as_taught"] > 0
    meter.reset()
    meter.add(loss)
    assert "as_taught" not in meter.means()


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
