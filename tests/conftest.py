"""Tiny models shared by all tests: made once per run, from nothing but this file. Treat the folders as read-only."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from training.model.generation import DMPTForCausalLM

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # nor report
CACHE = tempfile.mkdtemp(prefix="dmpt-export-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE  # nor for what other runs have remembered
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said once, so that forks do not warn

SAMPLE_TEXT = """
 = The tide mill =
A tide mill is driven by the rise and fall of the sea . When the tide comes in , water enters a pond through a
gate , and the gate closes by itself as soon as the tide begins to fall . The stored water then turns the wheel .
Most mills worked about six hours in every twelve , by day and by night , because the tide waits for no miller .
 = = Naïve questions – and answers = =
Did the mill earn more than it cost ? In 1785 it did : £ 40 a year , with flour for two hundred people .
The wheel was five metres wide , the stones weighed a ton , and the dam was nearly three hundred metres long .
"""
CONTEXT = 64
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "n_positions": CONTEXT,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "initializer_range": 0.2,  # ten times the usual: outputs far from uniform, so that parities mean something
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="session")
def bitsandbytes() -> Iterator[None]:
    """bitsandbytes, or where it is not installed its arithmetic in numpy (tests.helpers.fake_bitsandbytes)."""
    if find_spec("bitsandbytes"):
        yield
        return
    from tests.helpers import fake_bitsandbytes

    with pytest.MonkeyPatch.context() as patch:
        for name, module in fake_bitsandbytes.modules().items():
            patch.setitem(sys.modules, name, module)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's sums in one order, so that equal means bitwise equal."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sample_text() -> str:
    """A few lines with blank lines, headings and characters outside ASCII."""
    return SAMPLE_TEXT


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's kind of tokenizer, in both forms: tokenizer.json, and vocab.json with merges.txt."""
    from training.text.windows import train_tokenizer

    tokenizer = train_tokenizer(SAMPLE_TEXT.splitlines(), 300)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def make_gpt2(tokenizer_folder: Path) -> Callable[..., Any]:
    """make_gpt2(folder, **config) writes a random Hugging Face GPT-2 with its tokenizer and returns the model."""

    def make(folder: Path, **changes: Any) -> Any:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        from training.checkpoints.checkpoint import copy_tokenizer

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**(TINY | changes))).eval()
        randomize_vectors(model)
        model.save_pretrained(folder)
        copy_tokenizer(tokenizer_folder, folder)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_gpt2(make_gpt2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Hugging Face GPT-2: 4 blocks, 4 attention heads, width 32, 64 positions, 300 tokens, tied head."""
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    make_gpt2(folder)
    return folder


@pytest.fixture(scope="session")
def make_dmpt(tokenizer_folder: Path) -> Callable[..., DMPTForCausalLM]:
    """make_dmpt(folder, **config) writes a random DMPT checkpoint with its tokenizer and returns the model."""

    def make(folder: Path, **changes: Any) -> DMPTForCausalLM:
        import torch

        from training.checkpoints.checkpoint import save_model
        from training.model.config import DMPTConfig
        from training.model.generation import DMPTForCausalLM

        torch.manual_seed(1)
        model = DMPTForCausalLM(DMPTConfig(**(TINY | {"gate_hidden": 16} | changes))).eval()
        randomize_vectors(model)
        balance_gates(model)
        save_model(model, folder, tokenizer_from=tokenizer_folder)
        return model

    return make


@pytest.fixture
def gpt2_copy(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_gpt2, tmp_path / "gpt2"))


@pytest.fixture
def dmpt_copy(tiny_dmpt: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_dmpt, tmp_path / "dmpt"))


def randomize_vectors(model: Any) -> None:
    """Move norms and biases away from one and zero: a swapped or forgotten vector must change the result."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.1)


@pytest.fixture(scope="session")
def tiny_dmpt(make_dmpt: Callable[..., DMPTForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dual-path DMPT: 4 blocks split at 2, 2 heads a leaf, fast-k 16; its routes switch often."""
    folder = tmp_path_factory.mktemp("tiny_dmpt") / "model"
    make_dmpt(folder, splits=[2], head_allocation={"left": [0, 1], "right": [2, 3]}, fast_k=16)
    return folder


@pytest.fixture(scope="session")
def dual_device(tiny_dmpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX folder, which no test may change."""
    from dmpt_export.onnx.export import export_onnx

    out = tmp_path_factory.mktemp("dual_device") / "device"
    export_onnx(tiny_dmpt, out, verify=False)
    return out


@pytest.fixture(scope="session")
def tiny_quad(make_dmpt: Callable[..., DMPTForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random quad DMPT: splits 2 and 3, uneven heads (one leaf without a head gate), fast-k 16, head_topk 2."""
    folder = tmp_path_factory.mktemp("tiny_quad") / "model"
    allocation = {"left_left": [0], "left_right": [1, 2], "right_left": [3, 4, 5], "right_right": [6, 7]}
    make_dmpt(folder, splits=[2, 3], head_allocation=allocation, fast_k=16, head_topk=2)
    return folder


def balance_gates(model: DMPTForCausalLM) -> None:
    """Shift every gate's bias so that its choices switch: tokens that all take one path prove nothing about routing."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, logits in model.hidden(ids).gates.items():
            model.gates[name][2].bias[0] += (logits[..., 1] - logits[..., 0]).median()
        if model.config.splits:
            counts = model.routes(model.hidden(ids).gates).flatten().bincount(minlength=len(model.config.leaves))
            assert counts.min() > 0.05 * ids.numel(), f"tokens by leaf: {counts.tolist()}"
