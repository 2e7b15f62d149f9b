"""Exported folders in the lm-evaluation-harness: every figure against one computed from Model.score."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import runtime
from benchmarks.lm_eval.generation import Settings, continued, settings_of
from benchmarks.lm_eval.likelihood import Likelihoods
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import save_quantized
from runtime.errors import RequestError
from runtime.model import Model
from tests.helpers.paths import REPOSITORY

CLOSE = 2e-4  # nats: kernels add in another order where fewer rows run together


@pytest.fixture(scope="module", params=["tiny_gpt2", "tiny_dmpt"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lm-eval") / "device"
    export_onnx(request.getfixturevalue(request.param), out, verify=False)
    return out


@pytest.fixture(scope="module")
def model(exported: Path) -> Iterator[Model]:
    with runtime.load(exported, threads=1) as model:
        yield model


def oracle(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition, row by row, for texts that fit."""
    log_probs = model.log_probs((context + continuation)[:-1])[-len(continuation) :]
    gold = [float(row[token]) for row, token in zip(log_probs, continuation, strict=True)]
    return sum(gold), log_probs.argmax(-1).tolist() == continuation


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, each from a full run."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.log_probs(ids)[-1].argmax()))
        if ids[-1] in model.ends:
            break
    return ids[len(prompt) :]


def random_pairs(model: Model, count: int = 12) -> list[tuple[list[int], list[int]]]:
    """Contexts with equal beginnings, continuations of several lengths, and equal inputs."""
    rng = np.random.default_rng(0)
    base = rng.integers(1, model.vocab_size, 40).tolist()
    pairs = []
    for _ in range(count):
        context = base[: rng.integers(1, 40)] + rng.integers(1, model.vocab_size, rng.integers(0, 4)).tolist()
        pairs.append((context, rng.integers(1, model.vocab_size, rng.integers(1, 12)).tolist()))
    pairs += [(base, [token]) for token in (5, 9, 7)]  # multiple choice: one run
    likeliest = greedy(model, base, 3)
    return [*pairs, (base, likeliest), (base, [*likeliest[:-1], 7])]


# --- without the harness ------------------------------------------------------------------------------


def test_log_likelihoods_are_sums_of_score(model: Model) -> None:
    pairs = random_pairs(model)
    found = Likelihoods(model).score(pairs)
    for pair, (total, same) in zip(pairs, found, strict=True):
        wanted, is_greedy = oracle(model, *pair)
        assert total == pytest.approx(wanted, abs=CLOSE)
        assert same == is_greedy
    assert [same for _, same in found[-2:]] == [True, greedy(model, pairs[-1][0], 3)[-1] == 7]


def test_scores_do_not_depend_on_their_order(model: Model) -> None:
    pairs = random_pairs(model)
    likelihoods = Likelihoods(model)
    forth, back = likelihoods.score(pairs), likelihoods.score(pairs[::-1])[::-1]
    alone = [Likelihoods(model).score([pair])[0] for pair in pairs]
    for several in (forth, back):
        assert [total for total, _ in several] == pytest.approx([total for total, _ in alone], abs=CLOSE)


def test_kernels_that_round_rows_together_share_nothing(tiny_dmpt: Path, tmp_path: Path) -> None:
    """Each score is then exactly that of Model.score, whatever was scored before."""
    save_quantized(tiny_dmpt, tmp_path / "small", "int8-dynamic")
    export_onnx(tmp_path / "small", tmp_path / "device", verify=False)
    with runtime.load(tmp_path / "device", threads=1) as model:
        pairs = random_pairs(model)
        for (context, continuation), (total, _) in zip(pairs, Likelihoods(model).score(pairs), strict=True):
            n = len(continuation)
            log_probs, _ = model.score((context + continuation)[:-1], last=n)
            assert total == pytest.approx(log_probs[np.arange(n), continuation].sum(dtype=np.float64), abs=1e-9)


def test_equal_beginnings_run_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    likelihoods, fed = Likelihoods(model), []
    feed = likelihoods.text.feed
    monkeypatch.setattr(likelihoods.text, "feed", lambda ids, last: fed.append(len(ids)) or feed(ids, last))
    context = list(range(10, 50))
    likelihoods.score([(context, [5]), (context, [6]), (context, [6]), (context, [5, 6]), ([*context[:20], 9], [8])])
    # sorted by what is fed: 9 after 20 tokens, then the 40, then one more (the row before it is wanted again)
    assert fed == [21, 20, 2]


def test_long_pairs_lose_their_beginning(model: Model) -> None:
    n = model.context
    ids = np.random.default_rng(1).integers(1, model.vocab_size, n + 30).tolist()
    (total, _), (whole, _) = Likelihoods(model).score([(ids[:-5], ids[-5:]), (ids[:1], ids[1 : n + 1])])
    kept = ids[-(n + 1) :]
    assert total == pytest.approx(oracle(model, kept[:-5], kept[-5:])[0], abs=CLOSE)
    assert whole == pytest.approx(oracle(model, ids[:1], ids[1 : n + 1])[0], abs=CLOSE)
    with pytest.raises(RequestError, match=f"continuation of {n + 1} tokens does not fit the context of {n}"):
        Likelihoods(model).score([([1], ids[: n + 1])])
    with pytest.raises(RequestError, match="no tokens to continue"):
        Likelihoods(model).score([([], [1])])


def test_a_failed_run_leaves_nothing_behind(model: Model) -> None:
    likelihoods, pairs = Likelihoods(model), random_pairs(model, 3)
    with pytest.raises(RequestError, match="unknown token id"):
        likelihoods.score([*pairs, ([1, 2, 10**6], [3, 4])])
    found = [total for total, _ in likelihoods.score(pairs)]
    assert found == pytest.approx([oracle(model, *pair)[0] for pair in pairs], abs=CLOSE)


def test_texts_are_continued_as_the_model_says(model: Model) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(1, model.vocab_size, n).tolist() for n in (3, 9, 1)]
    settings = settings_of({"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}, model.context)
    wanted = [model.decode(greedy(model, prompt, 8)) for prompt in prompts]
    assert continued(model, prompts, settings) == wanted
    assert continued(model, prompts, settings, together=2) == wanted
    stop = wanted[0][2:4]
    cut = settings_of({"until": stop, "max_gen_toks": 8}, model.context)
    assert continued(model, prompts[:1], cut) == [wanted[0].split(stop)[0]]
    long = rng.integers(1, model.vocab_size, model.context + 9).tolist()
    assert continued(model, [long], settings) == [model.decode(greedy(model, long[-(model.context - 8) :], 8))]


def test_samples_are_repeatable(model: Model) -> None:
    settings = settings_of({"do_sample": True, "temperature": 1.3, "top_k": 50, "max_gen_toks": 12}, model.context)
    one, same, other = (continued(model, [[5, 6]] * 2, settings, seed=seed) for seed in (1, 1, 7))
    assert one == same != other
    assert one[0] != one[1]  # repeats of a prompt differ
    assert one[1] == continued(model, [[5, 6]], settings, seed=2)[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Settings(256, (), {"temperature": 0.0})),
        ({"until": ["a", ""], "temperature": 0.8}, Settings(256, ("a",), {"temperature": 0.8})),
        ({"do_sample": True, "max_new_tokens": 5, "top_p": 0.9}, Settings(5, (), {"temperature": 1.0, "top_p": 0.9})),
        ({"do_sample": False, "temperature": 0.8, "top_k": 3, "num_beams": 1}, Settings(256, (), {"temperature": 0.0})),
        ({"max_tokens": 7, "max_gen_toks": 9, "until": "x"}, Settings(9, ("x",), {"temperature": 0.0})),
    ],
)
def test_settings(given: dict[str, Any], wanted: Settings) -> None:
    assert settings_of(given, 1024) == wanted


def test_default_length_leaves_room_for_the_prompt() -> None:
    assert [settings_of({}, context).max_new_tokens for context in (64, 512, 2048)] == [32, 256, 256]
    assert settings_of({}, 1024, most=10).max_new_tokens == 10


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_beams": 4}, "num_beams=4 does not exist here"),
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves no room for a prompt in the context of 64 tokens"),
        ({"max_gen_toks": "many"}, "max_gen_toks=many must be a whole number"),
        ({"do_sample": True, "temperature": 0.0}, "set a temperature above 0"),
    ],
)
def test_settings_that_cannot_be_followed(given: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        settings_of(given, 64)


def test_a_missing_harness_is_one_line() -> None:
    code = (
        "import runpy, sys\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'lm_eval' else find(name, *more)\n"
        "runpy.run_module('benchmarks.lm_eval', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "Error: lm_eval is not installed: pip install lm_eval\n"


# --- with the harness ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(exported: Path) -> Any:
    """The model class, opened as the harness does."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.registry import get_model

    import benchmarks.lm_eval.model  # noqa: F401 (registers the class)

    defaults = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    return get_model("dmpt").create_from_arg_obj({"path": str(exported), "threads": 1}, defaults)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def test_harness_log_likelihoods(harness: Any, model: Model) -> None:
    asked = [("The tide mill", " is driven"), ("", "The tide"), ("The tide mill ", "is"), ("The tide mill", " was")]
    found = harness.loglikelihood(requests(*asked), disable_tqdm=True)
    assert model.end_of_text is not None
    for (context, continuation), (total, same) in zip(asked, found, strict=True):
        whole = model.encode(context + continuation)
        before = model.encode(context.rstrip()) if context else []
        wanted = oracle(model, before or [model.end_of_text], whole[len(before) :])
        assert (total, same) == (pytest.approx(wanted[0], abs=CLOSE), wanted[1])


def test_harness_rolling_reads_whole_documents(harness: Any, model: Model, sample_text: str) -> None:
    assert model.end_of_text is not None
    short, long = "The tide", sample_text
    ids, n = model.encode(long), model.context
    assert len(ids) > 3 * n
    wanted, done = 0.0, 0
    while done < len(ids):
        count = min(n, len(ids) - done)
        window = ([model.end_of_text, *ids] if done == 0 else [0, *ids])[max(0, done + count - n) : done + count + 1]
        wanted += oracle(model, window[:-count], window[-count:])[0]
        done += count
    found = harness.loglikelihood_rolling(requests((long,), (short,)), disable_tqdm=True)
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    assert found[1] == pytest.approx(oracle(model, [model.end_of_text], model.encode(short))[0], abs=CLOSE)
    assert harness.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0]


def test_harness_text(harness: Any, model: Model) -> None:
    plain, sampled = {"until": ["\n"], "max_gen_toks": 6}, {"do_sample": True, "temperature": 2.0, "max_gen_toks": 6}
    prompts = [("The tide", plain), ("The mill", sampled), ("Most mills", plain), ("", plain)]
    found = harness.generate_until(requests(*prompts), disable_tqdm=True)
    assert model.end_of_text is not None
    for at in (0, 2, 3):
        ids = model.encode(prompts[at][0]) or [model.end_of_text]
        assert found[at] == model.decode(greedy(model, ids, 6)).split("\n")[0]
    assert harness.generate_until(requests(*prompts), disable_tqdm=True) == found


def test_harness_describes_the_model(harness: Any, model: Model) -> None:
    assert (harness.max_length, harness.max_gen_toks) == (model.context, model.context // 2)
    assert harness.prefix_token_id == harness.eot_token_id == model.end_of_text
    assert harness.tok_decode(harness.tok_encode("The tide mill")) == "The tide mill"
    assert harness.chat_template(False) == ""
    with pytest.raises(RequestError, match="has no chat template"):
        harness.chat_template(True)


def test_the_models_of_the_harness_stay_known() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    code = (
        "import benchmarks.lm_eval.model\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert {'dmpt', 'hf'} <= set(model_registry)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_harness_arguments(harness: Any, exported: Path) -> None:
    path = str(exported)
    for given, match in (
        ({}, "no path"),
        ({"path": path, "dtype": "x"}, "unknown dtype"),
        ({"path": path, "batch_size": "many"}, "batch_size=many must be a whole number"),
        ({"path": path, "batch_size": 0}, "batch_size=0: set it to 1 or above"),
    ):
        with pytest.raises(RequestError, match=match):
            type(harness).create_from_arg_obj(given)
    made = type(harness).create_from_arg_obj({"path": str(exported), "batch_size": "auto"}, {"batch_size": 1})
    assert (made.together, made.model.device) == (16, "cpu")
    made.model.close()


def test_harness_task(harness: Any, sample_text: str, tmp_path: Path) -> None:
    """A whole task, from a local file to the metric."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "text.txt").write_text(sample_text, encoding="utf-8")
    (tmp_path / "mill.yaml").write_text(
        "task: mill\ndataset_path: text\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'text.txt'}\n  sample_by: document\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model=harness, tasks=["mill"], task_manager=tasks, bootstrap_iters=0)
    (total,) = harness.loglikelihood_rolling(requests((sample_text,)), disable_tqdm=True)
    wanted = -total / np.log(2) / len(sample_text.encode())
    assert found["results"]["mill"]["bits_per_byte,none"] == pytest.approx(wanted)
