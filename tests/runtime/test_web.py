"""The JavaScript runtime in Node gives what the Python one gives: log-probs, routes, tokens, texts and refusals.

Needs Node and `npm ci --ignore-scripts` in runtime/web; skipped with a reason where one is missing. Engines:
onnxruntime-node, which writes caches in place, and onnxruntime-web, as in a browser, whose caches are copied or
lie in its heap.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from dmpt_export.check.tolerances import TOLERANCES, loosest
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from quant.checkpoint import save_quantized
from runtime.sampling import Sampler, Sampling
from tests.helpers.exports import TREES
from tests.helpers.models import saved_model
from tests.helpers.paths import REPOSITORY

WEB = REPOSITORY / "runtime" / "web"
NODE = shutil.which("node")
MISSING = (
    "Node is not installed"
    if NODE is None
    else ""
    if (WEB / "node_modules" / "onnxruntime-node").is_dir()
    else "no node_modules: run `npm ci --ignore-scripts` in runtime/web"
)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
HEAP = "onnxruntime-web, caches in the heap"
ENGINES = ("onnxruntime-node", "onnxruntime-web", HEAP)
EXACT = TOLERANCES[("float32", "float")].max_abs
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """ask(job, ..., engine=NAME): what the module answers."""

    def run(*jobs: dict[str, Any], engine: str = ENGINES[0]) -> list[dict[str, Any]]:
        request = tmp_path / "request.json"
        request.write_text(json.dumps({"web": str(WEB), "engine": engine, "jobs": jobs}))
        probe = REPOSITORY / "tests" / "helpers" / "web_probe.mjs"
        done = subprocess.run([str(NODE), str(probe), str(request)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers

    return run


@pytest.fixture(scope="module")
def devices(
    tiny_gpt2: Path, tiny_dmpt: Path, tiny_quad: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("web")
    sources = {"gpt2": tiny_gpt2, "dual": tiny_dmpt, "quad": tiny_quad}
    sources["one matrix"] = saved_model(place / "one-matrix", **TREES["projected, one anchor"])
    sources["long"] = saved_model(place / "long-source", **TREES["dual, all heads"], n_positions=300)
    for name, source in sources.items():
        export_onnx(source, place / name, verify=False)
    return {name: place / name for name in sources}


def plan(seed: int, vocabulary: int) -> list[Any]:
    """Pieces of random sizes, single tokens, and two rewinds, in 60 positions."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, 200).tolist()
    sizes = [5, 1, 1, 1, 9, 1, 1, "rewind", 1, 1, 3, 1, 1, 1, 1, "rewind", 1, 7, 1, 1, 1]
    steps: list[Any] = []
    length = 0
    for size in sizes:
        if size == "rewind":
            length -= int(rng.integers(1, 6))
            steps.append(length)
            continue
        assert isinstance(size, int)
        steps.append([ids[:size], int(rng.integers(1, size + 1))])
        ids, length = ids[size:], length + size
    return steps


def followed(folder: Path, steps: list[Any]) -> list[tuple[np.ndarray, list[int]]]:
    """The same plan in Python."""
    out = []
    with runtime.load(folder, threads=1) as model:
        sequence = model.sequence()
        for step in steps:
            if isinstance(step, int):
                sequence.rewind(step)
            else:
                log_probs, routes = sequence.feed(*step)
                out.append((log_probs, routes.tolist()))
    return out


@pytest.mark.parametrize("splits", [[], [1]])
@pytest.mark.parametrize("last", [1, 150])
def test_long_prompts_in_pieces_as_python_reads_them(splits: list[int], last: int, tmp_path: Path, ask: Ask) -> None:
    """int8-dynamic rounds the rows of a run together, so other pieces would give other numbers."""
    source = saved_model(tmp_path / "source", splits, 2 ** len(splits), n_positions=300)
    save_quantized(source, tmp_path / "quantized", "int8-dynamic", vocabulary="int8-dynamic")
    export_onnx(tmp_path / "quantized", tmp_path / "device", verify=False)
    ids = np.random.default_rng(6).integers(0, 97, 283).tolist()
    steps = [[ids, last], [[5], 1]]
    [answer] = ask({"job": "feed", "folder": str(tmp_path / "device"), "plan": steps})
    for got, (log_probs, routes) in zip(answer["result"], followed(tmp_path / "device", steps), strict=True):
        assert got["routes"] == routes
        np.testing.assert_allclose(got["logProbs"], log_probs.ravel(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gpt2", "dual", "quad", "one matrix"])
def test_log_probs_and_routes_are_those_of_python(name: str, engine: str, devices: dict[str, Path], ask: Ask) -> None:
    steps = plan(3, 90)
    [answer] = ask({"job": "feed", "folder": str(devices[name]), "plan": steps}, engine=engine)
    want = followed(devices[name], steps)
    assert name == "gpt2" or len({leaf for _, routes in want for leaf in routes}) > 1, "no switches, no catch-up"
    for got, (log_probs, routes) in zip(answer["result"], want, strict=True):
        assert got["routes"] == routes
        np.testing.assert_allclose(got["logProbs"], log_probs.ravel(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("engine", ENGINES)
def test_caches_keep_their_tokens_when_they_grow(engine: str, devices: dict[str, Path], ask: Ask) -> None:
    ids = np.random.default_rng(7).integers(0, 97, 300).tolist()
    steps = [[ids[:100], 1], [ids[100:129], 2], [ids[129:130], 1], 120, [ids[:150], 3], [ids[150:180], 1]]
    [answer] = ask({"job": "feed", "folder": str(devices["long"]), "plan": steps}, engine=engine)
    for got, (log_probs, routes) in zip(answer["result"], followed(devices["long"], steps), strict=True):
        assert got["routes"] == routes
        np.testing.assert_allclose(got["logProbs"], log_probs.ravel(), rtol=0, atol=EXACT)


STORED = [
    ("int8", None, "float"),
    ("int4", None, "float"),
    ("int8", None, "int8"),
    ("int8-dynamic", "int8-dynamic", "float"),
    ("int8-dynamic", "fp16", "int8"),
]


@pytest.mark.parametrize("tree", ["dual, fast-k", "projected, one anchor"])
@pytest.mark.parametrize(
    ("engine", "scheme", "vocabulary", "cache"),
    [(engine, *stored) for engine in ENGINES for stored in STORED if engine != HEAP or stored[2] == "int8"],
)
def test_quantized_models_stay_within_their_tolerance(
    scheme: str, vocabulary: str | None, cache: str, tree: str, engine: str, tmp_path: Path, ask: Ask
) -> None:
    source = saved_model(tmp_path / "source", **TREES[tree])
    save_quantized(source, tmp_path / "quantized", scheme, vocabulary=vocabulary)
    export_onnx(tmp_path / "quantized", tmp_path / "device", ExportOptions(kv_cache=cache), verify=False)
    ids = np.random.default_rng(5).integers(0, 97, 48).tolist()
    steps = [[ids[:16], 16], *([[token], 1] for token in ids[16:])]
    [answer] = ask({"job": "feed", "folder": str(tmp_path / "device"), "plan": steps}, engine=engine)
    want = followed(tmp_path / "device", steps)
    got = np.concatenate([np.reshape(step["logProbs"], (-1, 97)) for step in answer["result"]])
    mine = np.concatenate([log_probs for log_probs, _ in want])
    routes = [np.concatenate([np.array(step) for step in taken]) for taken in
              ([step["routes"] for step in answer["result"]], [leaves for _, leaves in want])]  # fmt: skip
    same = routes[0] == routes[1]
    assert same.mean() > 0.9
    kl = (np.exp(mine) * (mine - got)).sum(-1)[same].mean()
    assert kl < loosest("float32", [scheme]).kl_mean


def test_exports_with_scales_of_branches_in_their_data_file_are_refused_in_browsers(tmp_path: Path, ask: Ask) -> None:
    """Those of earlier versions: onnxruntime-web 1.30 looks for such data on a disk."""
    source = saved_model(tmp_path / "source", **TREES["dual, one head each"], n_embd=128, n_head=4)
    save_quantized(source, tmp_path / "quantized", "int8")
    export_onnx(tmp_path / "quantized", tmp_path / "device", verify=False)
    job = {"job": "feed", "folder": str(tmp_path / "device"), "plan": [[[1, 2, 3], 1], [[4], 1]]}
    [answer] = ask(job, engine="onnxruntime-web")
    assert len(answer["result"]) == 2
    path = tmp_path / "device" / "dmpt_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["branches_inline"]
    path.write_text(json.dumps(manifest))
    [answer] = ask(job, engine="onnxruntime-web")
    assert "export the model again" in answer["error"]
    [answer] = ask(job, engine="onnxruntime-node")
    assert len(answer["result"]) == 2


FAULTS = ["a function is missing", "pointers are wider", "outputs are not written in place",
          "a run has other parameters", "types have other numbers"]  # fmt: skip


def test_the_heap_is_used_only_where_its_private_functions_work(devices: dict[str, Path], ask: Ask) -> None:
    folder = str(devices["long"])
    [public] = ask({"job": "heap", "folder": folder}, engine="onnxruntime-web")
    assert public["result"] == {"used": False}
    for fault in FAULTS:
        [answer] = ask({"job": "heap", "folder": folder, "fault": fault}, engine=HEAP)
        assert answer["result"] == {"used": False}, fault


def test_nothing_stays_in_the_heap_after_dispose(devices: dict[str, Path], ask: Ask) -> None:
    [answer] = ask({"job": "heap", "folder": str(devices["long"])}, engine=HEAP)
    assert answer["result"]["used"]
    assert answer["result"]["most"] > 20
    assert answer["result"]["left"] == 0


ENDLESS = 0  # the end-of-text id of these models
OPTIONS: list[dict[str, Any]] = [
    {},
    {"seed": 7},
    {"seed": 2**40 + 3, "temperature": 0.7},
    {"seed": 1, "top_k": 5},
    {"seed": 2, "top_p": 0.8, "temperature": 1.5},
    {"seed": 3, "min_p": 0.1},
    {"seed": 4, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3},
    {"repetition_penalty": 2.0, "logit_bias": {3: 9.0, 5: -100.0}},
]


def in_javascript(options: dict[str, Any]) -> dict[str, Any]:
    names = {"top_k": "topK", "top_p": "topP", "min_p": "minP", "repetition_penalty": "repetitionPenalty",
             "logit_bias": "logitBias"}  # fmt: skip
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_seeds_draw_equal_tokens(options: dict[str, Any], ask: Ask) -> None:
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 3, (60, 500)).astype(np.float32)
    logits[::7, 3] = logits[::7, 4] = 12  # ties
    rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sampler = Sampler(Sampling(**options), [3, 4, 499])
    want = [sampler(row) for row in rows]
    [answer] = ask({"job": "draw", "options": in_javascript(options), "rows": rows.tolist(), "seen": [3, 4, 499]})
    assert answer["result"] == want


def test_random_numbers_are_numpys(ask: Ask) -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1]
    answers = ask(*({"job": "random", "seed": seed, "count": 50} for seed in seeds))
    for seed, answer in zip(seeds, answers, strict=True):
        assert answer["result"] == np.random.default_rng(seed).random(50).tolist()


TEXTS = ["The tide mill", " two  spaces", "naïve café — 日本語 🙂", "a\nb\n\nc", "<|endoftext|>x", "x" * 50]


def test_texts_are_read_and_written_alike(devices: dict[str, Path], ask: Ask) -> None:
    [answer] = ask({"job": "texts", "folder": str(devices["gpt2"]), "texts": TEXTS})
    with runtime.load(devices["gpt2"]) as model:
        for text, got in zip(TEXTS, answer["result"], strict=True):
            assert got == {"ids": model.encode(text), "text": model.decode(model.encode(text))}


@pytest.mark.parametrize("name", ["gpt2", "dual", "quad"])
def test_texts_end_alike(name: str, devices: dict[str, Path], ask: Ask) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_new_tokens": 12}, {}),
        ({"max_new_tokens": 200}, {"seed": 5}),
        ({"max_new_tokens": 60, "stop": ["e", "th"]}, {"seed": 6, "top_k": 20}),
        ({"max_new_tokens": 30, "stop": "zzz"}, {"seed": 8, "temperature": 2.0}),
        ({"max_new_tokens": 200}, {"seed": 9, "logit_bias": {ENDLESS: -100.0}}),
    ]
    prompt = "The tide mill is"
    jobs = [
        {"job": "generate", "folder": str(devices[name]), "prompt": prompt, "options": in_javascript(options) | {
            "maxNewTokens": limits["max_new_tokens"], "stop": limits.get("stop", [])}}
        for limits, options in cases
    ]  # fmt: skip
    reasons = set()
    with runtime.load(devices[name], threads=1) as model:
        assert model.ends == {ENDLESS}
        for (limits, options), answer in zip(cases, ask(*jobs), strict=True):
            made = model.stream(prompt, **limits, **options)
            tokens = list(made)
            got = answer["result"]
            assert (got["ids"], got["text"], got["stopReason"]) == (made.ids, made.text, made.stop_reason)
            assert got["pieces"] == [token.text for token in tokens]
            assert got["paths"] == [token.path for token in tokens]
            reasons.add(made.stop_reason)
    assert {"max_new_tokens", "context_full"} <= reasons


@pytest.mark.parametrize("engine", ENGINES)
def test_texts_of_several_models_can_be_written_at_once(engine: str, devices: dict[str, Path], ask: Ask) -> None:
    folders = [str(devices[name]) for name in ("gpt2", "dual")]
    prompt, options = "The tide mill is", {"logitBias": {ENDLESS: -100}, "maxNewTokens": 12}
    jobs = [{"job": "generate", "folder": folder, "prompt": prompt, "options": options} for folder in folders]
    first, second = (answer["result"]["text"] for answer in ask(*jobs))
    assert first != second
    [answer] = ask({"job": "overlap", "folders": folders, "prompt": prompt, "options": options}, engine=engine)
    assert answer.get("result") == [first] * 3 + [second] * 3, answer


MISTAKES = {
    "no options": "load() needs ort",
    "no folder": "load() needs folder",
    "unknown option": "unknown option tokenizer",
    "no server": "http://127.0.0.1:9/model/dmpt_manifest.json cannot be loaded",
    "no prompt": "undefined must be text or a list of token ids",
    "a number": "5 must be text or a list of token ids",
    "routes of text": "a must be a list of token ids",
    "again": "this text was already generated",
    "overlapping feeds": "this text is still reading tokens",
    "rewind": "rewind to -1: the length must be a whole number",
    "rewind to half": "rewind to 1.5",
    "disposed text": "this text was disposed",
    "disposed model": "this model was disposed",
    "text of a disposed model": "this model was disposed",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_mistakes_in_a_program_are_named(engine: str, devices: dict[str, Path], ask: Ask) -> None:
    [answer] = ask({"job": "misuse", "folder": str(devices["dual"])}, engine=engine)
    result = answer["result"]
    assert result["length"] == 4, "three tokens, and the first of the feeds that overlapped"
    assert result["messages"].keys() == MISTAKES.keys()
    for name, message in MISTAKES.items():
        assert result["messages"][name].startswith(f"DmptError: {message}"), name


@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_and_foreign_folders_are_refused(
    engine: str, devices: dict[str, Path], tiny_gpt2: Path, tmp_path: Path, ask: Ask
) -> None:
    def changed(name: str, change: Callable[[Path], object]) -> Path:
        folder = Path(shutil.copytree(devices["gpt2"], tmp_path / name))
        change(folder)
        return folder

    def flip(folder: Path) -> None:
        data = bytearray((folder / "model.onnx.data").read_bytes())
        data[1000] ^= 1
        (folder / "model.onnx.data").write_bytes(data)

    def cut(folder: Path) -> None:
        data = (folder / "model.onnx.data").read_bytes()
        (folder / "model.onnx.data").write_bytes(data[:-10])

    def later(folder: Path) -> None:
        raw = json.loads((folder / "dmpt_manifest.json").read_text())
        (folder / "dmpt_manifest.json").write_text(json.dumps(raw | {"format_version": 99}))

    export_onnx(tiny_gpt2, tmp_path / "standard", ExportOptions(layout="standard"), verify=False)
    folders = [changed("flip", flip), changed("cut", cut), changed("later", later), tmp_path / "standard"]
    if engine == ENGINES[0]:
        folders.append(changed("absent", lambda folder: (folder / "model.onnx.data").unlink()))
    answers = ask(*({"job": "feed", "folder": str(folder), "plan": []} for folder in folders), engine=engine)
    messages = ["model.onnx.data has a different sha256", "model.onnx.data has", "this program reads dmpt-onnx, 2",
                "standard layout", "absent/model.onnx.data cannot be read (ENOENT)"]  # fmt: skip
    for message, answer in zip(messages, answers, strict=False):
        assert answer.get("error", "").startswith("DmptError: ")
        assert message in answer["error"]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([300], {}, "token id 300 must be"),
        ([1] * 65, {}, "do not fit the context of 64"),
        ([1], {"temperature": -1}, "temperature -1 must be"),
        ([1], {"topP": 0}, "topP 0 must be"),
        ([1], {"top_k": 3}, "unknown option top_k"),
        ([1], {"maxNewTokens": 0}, "maxNewTokens 0 must be"),
        ([1], {"stop": ""}, "a stop string must be text and not empty"),
        ([1], {"logitBias": {"400": 1}}, "must be a whole number from 0 to 299"),
    ],
)
def test_impossible_requests_are_refused(
    prompt: list[int], options: dict[str, Any], message: str, devices: dict[str, Path], ask: Ask
) -> None:
    [answer] = ask({"job": "generate", "folder": str(devices["gpt2"]), "prompt": prompt, "options": options})
    assert answer["error"].startswith("DmptError: ")
    assert message in answer["error"]
