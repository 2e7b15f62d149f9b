"""Peers in a comparison: scored and timed like the rest; absent, failing or mismatched ones do not stop it."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import benchmarks.quality.perplexity
from benchmarks.comparison import output
from benchmarks.comparison.comparison import compare
from benchmarks.comparison.contestants import Entry, Opener, Settings, peers_of
from benchmarks.comparison.result import Comparison
from benchmarks.peers import registry
from benchmarks.peers.adapters import FACTS
from benchmarks.peers.registry import PEERS, Peer, gpt2_folder, parse, read_facts
from benchmarks.quality.progress import Findings
from dmpt_export.cli.main import main
from training.errors import InputError

GOOD, DIES, SILENT = "good", "dies", "silent"  # schemes of the fake peer, see tests.helpers.bench_fakes.convert


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two peers: an installed one, which behaves as its scheme says, and one that is not installed."""
    here = Peer("tests.helpers.bench_fakes", (GOOD, DIES), ("numpy",), "pip install here")
    gone = Peer("tests.helpers.bench_fakes", ("q4",), ("no-such-package",), "pip install gone")
    monkeypatch.setattr(registry, "PEERS", {"here": here, "gone": gone})


@pytest.fixture
def text(sample_text: str, tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text, encoding="utf-8")
    return path


def run(entries: list[Entry], text: Path, out: Path | None = None, **more: Any) -> Comparison:
    return compare(entries, [text], out, Settings(prompt=8, gen=4, repetitions=2, threads=1, **more))


def test_a_peer_is_scored_on_the_same_tokens_and_timed(tiny_gpt2: Path, text: Path, tmp_path: Path) -> None:
    base, peer = run([Entry("base", str(tiny_gpt2)), Entry("here good", str(tiny_gpt2), scheme=GOOD, peer="here")],
                     text, out=tmp_path / "out").rows  # fmt: skip
    assert base.quality
    assert peer.quality
    assert peer.speed
    assert peer.quality.tokens_sha256 == base.quality.tokens_sha256
    assert peer.quality.tokens_scored == base.quality.tokens_scored
    # The fake is sure that each token follows itself, which is almost never so: a bad model, ranked below.
    assert peer.quality.perplexity > base.quality.perplexity
    assert peer.parameters == base.parameters
    assert peer.parameters_touched_per_token == base.parameters_touched_per_token
    assert peer.kind == "peer"
    assert peer.versions["numpy"] == np.__version__
    assert peer.size_bytes == 11
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert stored["rankings"]["perplexity"] == ["base", "here good"]
    assert "here good" in (tmp_path / "out" / "report.html").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["base", "here good"]
    assert rows[0]["decode_tokens_per_s"] == ""
    assert float(rows[1]["decode_tokens_per_s"]) == 16


FAULTS = {  # scheme of the fake peer -> what its row must say
    "broken": "cannot be converted",
    "full": "No space left on device",
    "unloadable": "RuntimeError: cannot be opened",
    SILENT: "does not return probabilities",
    DIES: "killed",
}


def test_a_peer_that_fails_is_a_row_that_says_why(tiny_gpt2: Path, text: Path) -> None:
    entries = [Entry(scheme, str(tiny_gpt2), scheme=scheme, peer="here") for scheme in [*FAULTS, GOOD]]
    result = run([*entries, Entry("base", str(tiny_gpt2))], text)
    rows = {row.name: row for row in result.rows}
    for (scheme, said), line in zip(FAULTS.items(), result.table().splitlines()[2:], strict=False):
        failure = rows[scheme].failure
        assert failure
        assert said in failure
        assert said in line
        assert any(note.startswith(f"{scheme} failed: ") and said in note for note in result.notes())
    assert rows[GOOD].quality
    assert rows[GOOD].speed
    assert not rows[GOOD].failure
    assert rows["base"].quality
    assert rows[SILENT].speed
    assert not rows[SILENT].quality
    assert rows[DIES].quality
    assert not rows[DIES].speed


def test_absent_peers_are_listed_with_how_to_get_them(tiny_gpt2: Path) -> None:
    found, absent = peers_of(str(tiny_gpt2), {})
    assert [entry.name for entry in found] == [f"here {GOOD}", f"here {DIES}"]
    assert absent == ["Peers that are not installed: gone (pip install gone)."]
    assert absent[0] in Comparison([], [], [], absent=absent).as_markdown()
    assert peers_of(None, {}) == ([], absent)
    assert peers_of(None, {}, asked={"gone"}) == ([], [])
    with pytest.raises(InputError, match="cannot be started"):
        peers_of(str(tiny_gpt2), {"here": "/no/python"})


def test_an_absent_peer_that_was_asked_for_says_how_to_get_it(tiny_gpt2: Path, text: Path) -> None:
    base, gone = run([Entry("base", str(tiny_gpt2)), Entry("q", str(tiny_gpt2), scheme="q4", peer="gone")], text).rows
    assert base.quality
    assert gone.failure == "it lacks no-such-package; pip install gone"


def test_an_interpreter_without_any_package_says_how_to_get_the_peer(
    tiny_gpt2: Path, text: Path, tmp_path: Path
) -> None:
    """Not even numpy, which a worker needs only for scores."""
    venv.create(tmp_path / "bare", symlinks=True)
    bare = {"here": str(tmp_path / "bare" / "bin" / "python")}
    assert registry.missing("here", bare["here"]) == ["numpy"]
    entries = [Entry("base", str(tiny_gpt2)), Entry("p", str(tiny_gpt2), scheme=GOOD, peer="here")]
    base, peer = run(entries, text, pythons=bare).rows
    assert base.quality
    assert peer.failure == "it lacks numpy; pip install here"


def test_peers_run_plain_gpt2_alone(tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path) -> None:
    assert gpt2_folder(tiny_gpt2, tmp_path / "x") == tiny_gpt2
    with pytest.raises(InputError, match="is not a plain float GPT-2"):
        gpt2_folder(tiny_dmpt, tmp_path / "x")
    entries = [Entry("base", str(tiny_gpt2)), Entry("here", str(tiny_dmpt), scheme=GOOD, peer="here")]
    with pytest.raises(InputError, match="is not a plain float GPT-2"):  # before the missing text is looked at
        run(entries, tmp_path / "no such text")


def test_other_weights_are_converted_apart(tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "a" / "gpt2", tmp_path / "b" / "gpt2"
    shutil.copytree(tiny_gpt2, same)
    shutil.copytree(tiny_dmpt, other)
    folders = [Opener(tmp_path).folder(Entry("x", str(path)), "gpt2") for path in (tiny_gpt2, same, other)]
    assert folders[0] == folders[1] != folders[2]
    nudge(same)
    assert Opener(tmp_path).folder(Entry("x", str(same)), "gpt2") not in folders


def nudge(folder: Path) -> None:
    """Other weights, of a worse model."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("wte.weight"))
    weights[name] = weights[name] + 0.3 * np.random.default_rng(0).standard_normal(weights[name].shape, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_causal_masks_are_no_parameters(tiny_gpt2: Path, text: Path, tmp_path: Path) -> None:
    """GPT-2's own file on the hub carries them."""
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_gpt2, folder)
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}
    weights = load_file(folder / "model.safetensors")
    save_file(weights | masks, folder / "model.safetensors", {"format": "pt"})
    base, peer = run([Entry("b", str(folder)), Entry("p", str(folder), scheme=GOOD, peer="here")], text).rows
    assert peer.parameters == base.parameters


def test_what_the_trainer_writes_of_gpt2_is_gpt2_again(tiny_gpt2: Path, tmp_path: Path) -> None:
    import torch
    from transformers import GPT2LMHeadModel

    from training.checkpoints.checkpoint import load_model, save_model

    model = load_model(tiny_gpt2)
    save_model(model, tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(gpt2_folder(tmp_path / "ours", tmp_path / "gpt2")).eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        expected = model.log_probs(ids, "gate_hard", None, 12)[0]
        torch.testing.assert_close(again(ids).logits[0].log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_the_notation_of_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "PEERS", PEERS)
    assert parse("llama.cpp:q4_0@a/b@c") == ("llama.cpp", "q4_0", "a/b@c")
    assert parse("folder@2") is None
    assert parse("here:int8@") is None
    with pytest.raises(InputError, match="int8 or int4, not 'int3'"):
        parse("openvino:int3@x")
    with pytest.raises(InputError, match=r"unknown peer 'ovino'.*llama\.cpp:q8_0"):
        parse("ovino:int8@x")
    (tmp_path / "a:b@c").mkdir()
    assert parse(str(tmp_path / "a:b@c")) is None  # a folder may be called so


def test_help_names_every_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, peer in PEERS.items():
        assert f"{name}:{' :'.join(peer.schemes)}" in words


def test_absent_peers_are_not_told_of_unless_asked_for(tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tiny_gpt2)]) == 0
    assert "pip install gone" not in capsys.readouterr().out


def test_a_tokenizer_of_another_model_is_refused(tiny_gpt2: Path, text: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny_gpt2, wrong)
    tokenizer = json.loads((wrong / "tokenizer.json").read_text())
    extra = {f"extra{i}": 5000 + i for i in range(400)}
    tokenizer["model"]["vocab"] |= {name: len(tokenizer["model"]["vocab"]) + i for i, name in enumerate(extra)}
    (wrong / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="do not belong together"):
        run([Entry("wrong", str(wrong))], text)


def test_a_model_that_fails_is_a_row_that_says_why(
    tiny_gpt2: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only a peer: a failure found late must not lose the others' figures."""
    bad, cut = tmp_path / "bad", tmp_path / "cut"
    for folder in (bad, cut):
        shutil.copytree(tiny_gpt2, folder)
    weights = load_file(bad / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.weight"))
    save_file(weights | {name: np.full_like(weights[name], np.nan)}, bad / "model.safetensors", {"format": "pt"})
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-8])
    assert main(["compare", str(bad), str(cut), f"good={tiny_gpt2}", "--data", str(text)]) == 4
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "bad (failed" in lines[2]
    assert "cut (failed" in lines[3]
    assert "good " in lines[4]
    assert "Traceback" not in err
    assert lines[2].count(" - ") >= 4
    assert "%" in lines[4]
    assert "bad failed: " in out
    assert "NaN" in out
    assert err.splitlines()[-1].startswith("Error: bad, cut could")


def qualities(result: Comparison) -> list[dict[str, Any]]:
    return [row.quality.to_json() for row in result.rows if row.quality]


def test_a_killed_comparison_goes_on(
    tiny_gpt2: Path, tiny_dmpt: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run dies at the second model; the next scores nothing twice, and says the same."""
    mine, state = tmp_path / "mine", tmp_path / "state"
    shutil.copytree(tiny_gpt2, mine)
    entries = [Entry("peer", str(mine), scheme=GOOD, peer="here"), Entry("a", str(mine)), Entry("b", str(tiny_dmpt))]
    whole, pieces = qualities(run(entries, text)), benchmarks.quality.perplexity.pieces
    asked: list[str] = []
    deadly = {"a"}

    def noted(scorer: Any, windows: Any) -> Any:
        if scorer.name in deadly:
            raise KeyboardInterrupt
        asked.append(scorer.name)
        return pieces(scorer, windows)

    monkeypatch.setattr(benchmarks.quality.perplexity, "pieces", noted)
    with pytest.raises(KeyboardInterrupt):
        run(entries, text, resume=state)
    assert set(asked) == {"peer"}
    deadly.clear()
    asked.clear()
    again = run(entries, text, resume=state)
    assert set(asked) == {"a", "b"}
    assert qualities(again) == whole
    assert again.rows[0].speed
    asked.clear()
    assert qualities(run(entries, text, resume=state)) == whole
    assert not asked
    nudge(mine)
    changed = qualities(run(entries, text, resume=state))
    assert set(asked) == {"peer", "a"}  # those whose weights changed
    assert changed[2] == whole[2]
    assert changed[1]["perplexity"] > whole[1]["perplexity"]


def test_a_moved_or_copied_source_is_read_where_it_is(tiny_gpt2: Path, text: Path, tmp_path: Path) -> None:
    """Some adapters convert nothing and store the source's path, whose weights may have changed since."""
    first, second, state = tmp_path / "first", tmp_path / "second", tmp_path / "state"
    shutil.copytree(tiny_gpt2, first)
    run([Entry("p", str(first), scheme="reads", peer="here")], text, resume=state)
    shutil.copytree(first, second)
    nudge(first)
    shutil.rmtree(state / "scores")  # so that it is scored again
    run([Entry("p", str(second), scheme="reads", peer="here")], text, resume=state)
    (facts,) = (read_facts(folder) for folder in (state / "here-reads").iterdir())
    assert facts["source"] == str(second)
    next((state / "here-reads").iterdir()).joinpath(FACTS).write_text("")  # by a full disk, say
    (row,) = run([Entry("p", str(second), scheme="reads", peer="here")], text, resume=state).rows
    assert row.quality
    assert not row.failure


def test_a_damaged_conversion_is_made_again(tiny_gpt2: Path, text: Path, tmp_path: Path) -> None:
    entries = [Entry("p", str(tiny_gpt2), scheme="file", peer="here")]
    run(entries, text, resume=tmp_path)
    (folder,) = (tmp_path / "here-file").iterdir()
    assert (folder / "weights").read_text() == "good"
    (folder / "weights").write_text("bad!")
    run(entries, text, resume=tmp_path)
    assert (folder / "weights").read_text() == "good"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_interpreter_that_says_something_else_is_a_failure(tiny_gpt2: Path, text: Path, tmp_path: Path) -> None:
    """A wrapper that prints a line before it starts Python."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "activating the environment"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    entries = [Entry("p", str(tiny_gpt2), scheme=GOOD, peer="here"), Entry("base", str(tiny_gpt2))]
    peer, base = run(entries, text, pythons={"here": str(python)}).rows
    assert "prints 'activating the environment' instead of a reply" in str(peer.failure)
    assert base.quality


def test_scores_that_cannot_be_kept_are_still_told(
    tiny_gpt2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Findings) -> None:
        if self.done:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Findings, "save", full)
    (row,) = run([Entry("base", str(tiny_gpt2))], text, resume=tmp_path).rows
    assert row.quality
    assert not row.failure


def test_a_dmpt_is_no_control(tiny_dmpt: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"d={tiny_dmpt}", "--control", "d", "--data", str(text)]) == 3
    assert "d is a DMPT: a control must be plain GPT-2" in capsys.readouterr().err


def test_a_peer_is_not_asked_for_twice(tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--peers", str(tiny_gpt2), "--threads", "1", "--repetitions", "1", "--prompt", "8", "--gen", "2"]
    assert main(["compare", f"here:{GOOD}@{tiny_gpt2}", *options]) == 0
    assert sum(line.startswith(f"| here {GOOD} ") for line in capsys.readouterr().out.splitlines()) == 1


def test_memory_that_runs_out_is_a_row(
    tiny_gpt2: Path, tiny_dmpt: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch reports it; but a bug of ours is raised, not hidden in a table."""
    entries, pieces = [Entry("a", str(tiny_gpt2)), Entry("b", str(tiny_dmpt)), Entry("c", str(tiny_gpt2))], []
    real = benchmarks.quality.perplexity.pieces
    pieces.append(RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"))
    monkeypatch.setattr(
        benchmarks.quality.perplexity,
        "pieces",
        lambda s, w: real(s, w) if s.name != "b" else (_ for _ in ()).throw(pieces[0]),
    )
    rows = run(entries, text).rows
    assert [bool(row.quality) for row in rows] == [True, False, True]
    assert "can't allocate" in str(rows[1].failure)
    pieces[0] = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        run(entries, text)


def test_a_failed_dmpt_or_control_is_said_to_have_failed(tiny_gpt2: Path, tiny_dmpt: Path, tmp_path: Path) -> None:
    cut = {}
    for name, source in (("gpt2", tiny_gpt2), ("dmpt", tiny_dmpt)):
        cut[name] = tmp_path / name
        shutil.copytree(source, cut[name])
        (cut[name] / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-8])
    tuned, ours = Entry("tuned", str(tiny_gpt2), control=True), Entry("ours", str(tiny_dmpt))
    assert "fp32: dmpt failed" in compare([tuned, Entry("dmpt", str(cut["dmpt"]))]).reading
    assert "fp32: gpt2 failed" in compare([Entry("gpt2", str(cut["gpt2"]), control=True), ours]).reading


def test_a_full_disk_does_not_take_the_result_away(
    tiny_gpt2: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(output, "write", full)
    assert main(["compare", str(tiny_gpt2), "--data", str(text), "--out", str(tmp_path / "out")]) == 5
    out, err = capsys.readouterr()
    assert "perplexity" in out
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_wrong_words_about_peers_are_usage_errors(tiny_gpt2: Path, text: Path) -> None:
    for words in (
        ["--peer-python", "nobody=/x"],
        ["--peer-python", "here"],
        ["--growth", str(text)],
        ["--control", "x"],
    ):
        assert main(["compare", str(tiny_gpt2), *words]) in (2, 3)
