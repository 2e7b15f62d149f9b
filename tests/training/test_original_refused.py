"""convert: files that are refused or incomplete, and files that would run code."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to plant a payload that must not run
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.cli import run
from tests.helpers.originals import DUAL, original_state, random_dmpt, same_model, save_dual
from training.checkpoints.original import read_original
from training.errors import InputError


def test_unmapped_tensors_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = original_state(random_dmpt(**DUAL), "dual")
    state |= {"adapter.weight": torch.zeros(2), "gate_2_left.0.weight": torch.zeros(2), "lm_head.bias": torch.zeros(2)}
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 3
    assert "no place in a DMPT: adapter.weight, gate_2_left.0.weight, lm_head.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    state = original_state(random_dmpt(**DUAL), "dual")
    del state["gate.2.bias"], state["right_path.1.ln_1.weight"]
    state["ln_f_left.bias"] = torch.zeros(3)
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    with pytest.raises(InputError) as caught:
        read_original(tmp_path / "file.pt")
    for name in ("gates.root.2.bias", "paths.right.h.3.ln_1.weight", "paths.left.ln_f.bias [3] instead of [64]"):
        assert name in str(caught.value)


def test_nan_names_the_tensor(tmp_path: Path) -> None:
    state = original_state(random_dmpt(**DUAL), "dual")
    state["left_path.0.mlp.c_fc.bias"][3] = torch.nan
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    with pytest.raises(InputError, match=r"'left_path\.0\.mlp\.c_fc\.bias' holds 1 NaN"):
        read_original(tmp_path / "file.pt")


class Payload:
    """The content of a hostile file: code that runs while it is read."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (self.command,)


def test_payload_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "ran"
    state = original_state(random_dmpt(**DUAL), "dual")
    torch.save({"model_state_dict": state, "model_config": Payload(ran)}, tmp_path / "file.pt")
    assert run("convert", tmp_path / "file.pt", tmp_path / "out") == 3
    told = capsys.readouterr().err
    assert "system" in told
    assert "was not loaded" in told
    assert len(told.splitlines()) == 1
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)  # the payload is a real one
    assert ran.exists()


def test_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "file.pt").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(InputError, match="is not a PyTorch checkpoint"):
        read_original(tmp_path / "file.pt")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a list"),
        ({"model_state_dict": {}}, "no tensors"),
        ({"model_state_dict": 7}, "no tensors"),
        ({"other.weight": torch.zeros(2)}, "no embeddings"),
        ({"wte.weight": torch.zeros(2), "wpe.weight": torch.zeros(2, 2)}, "no embeddings"),
        ({"wte.weight": torch.zeros(9, 64), "wpe.weight": torch.zeros(8, 64)}, "no blocks"),
        ({"wte.weight": torch.zeros(9, 64), "wpe.weight": torch.zeros(8, 64),
          "shared_layers.0.ln_1.bias": torch.zeros(64)}, "no vocabulary heads"),
    ],
)  # fmt: skip
def test_foreign_files(content: Any, match: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(InputError, match=match) as caught:
        read_original(tmp_path / "file.pt")
    assert "file.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    save_dual(tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "file.pt").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"file\.pt"):
            read_original(tmp_path / "file.pt")
    with pytest.raises(InputError, match="does not exist"):
        read_original(tmp_path / "none.pt")
    with pytest.raises(InputError, match="does not exist or is not a file"):
        read_original(tmp_path)


def test_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dual(tmp_path / "file.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match=r"2\.10"):
        read_original(tmp_path / "file.pt")


def test_undecidable_allocation_asks_for_the_file(tmp_path: Path) -> None:
    model = random_dmpt(**DUAL)
    state = original_state(model, "dual")
    state["lm_head.perceptrons.5.weight"] = torch.zeros(300, 64)
    torch.save({"model_state_dict": state}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="give head_allocation"):
        read_original(tmp_path / "file.pt")
    (tmp_path / "heads.json").write_text(json.dumps(DUAL["head_allocation"]))
    assert run("convert", tmp_path / "file.pt", tmp_path / "out", "--head-allocation", tmp_path / "heads.json") == 0
    same_model(model, tmp_path / "out")


def test_unknown_width_asks_for_the_attention_heads(tmp_path: Path) -> None:
    model = random_dmpt(**DUAL, n_embd=48, n_head=3)
    torch.save({"model_state_dict": original_state(model, "dual")}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="give n_head"):
        read_original(tmp_path / "file.pt")
    checkpoint, _ = read_original(tmp_path / "file.pt", n_head=3)
    assert checkpoint.config.n_head == 3


def test_wrong_tokenizer_is_refused_before_and_after(tmp_path: Path, tokenizer_folder: Path) -> None:
    save_dual(tmp_path / "file.pt")
    (tmp_path / "empty").mkdir()
    assert run("convert", tmp_path / "file.pt", tmp_path / "out", "--tokenizer", tmp_path / "empty") == 3
    small = random_dmpt(**DUAL, vocab_size=200)
    torch.save({"model_state_dict": original_state(small, "dual")}, tmp_path / "small.pt")
    assert run("convert", tmp_path / "small.pt", tmp_path / "out", "--tokenizer", tokenizer_folder) == 3
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "empty")
