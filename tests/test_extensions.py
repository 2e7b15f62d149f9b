"""What docs/contributing.md promises: a scheme, a storage form, a loss, a peer or a protocol is one function (or class)
and one entry in a table. Each test adds one from outside and takes it the whole way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import runtime
from benchmarks.comparison.comparison import compare
from benchmarks.comparison.contestants import Entry, Settings
from benchmarks.peers import registry
from benchmarks.quality import protocols
from benchmarks.quality.protocols import Protocol, Text, spans
from dmpt_export.cli.main import main
from quant.checkpoint import load_weights
from quant.forms.blockwise import BlockwiseTensor
from quant.forms.form import Form, Graph, Value, expect, two
from quant.forms.packing import pack
from quant.schemes import SCHEMES, Rounding, Scheme
from tests.helpers.models import random_model
from training.loop.objective import Objective
from training.loop.options import TrainOptions, opt
from training.loop.terms import TERMS, Batch


def int4_powers(array: NDArray[np.float32], block: int = 32) -> BlockwiseTensor:
    """4 bits whose scales are powers of two."""
    n, k = array.shape
    blocks = -(-k // block)
    padded = np.zeros((n, blocks * block), np.float32)
    padded[:, :k] = array
    padded = padded.reshape(n, blocks, block)
    scales = np.exp2(np.ceil(np.log2(np.maximum(np.abs(padded).max(-1), 1e-30) / 7))).astype(np.float32)
    codes = np.rint(padded / scales[..., None]).clip(-8, 7).astype(np.int8) + 8
    return BlockwiseTensor(pack(codes.astype(np.uint8), 4), scales, None, 4, block, (n, k), "int4-powers")


def test_a_scheme_is_one_function_and_one_entry(
    tiny_dmpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEMES, "int4-powers", Scheme(int4_powers, 4, zero_points=False))
    quantized, device = str(tmp_path / "quantized"), str(tmp_path / "device")
    assert main(["quantize", str(tiny_dmpt), quantized, "--scheme", "int4-powers"]) == 0
    assert main(["onnx", quantized, device]) == 0  # which checks it against torch
    stored = {weight.scheme for weight in load_weights(quantized)[1].values() if isinstance(weight, Form)}
    assert stored == {"int4-powers"}
    with runtime.load(device) as model:
        assert model.manifest.schemes == {"int4-powers"}
        assert len(model.generate([5, 6, 7], max_new_tokens=4)) == 4


@dataclass(frozen=True, eq=False)
class SignTensor(Form):
    """A form of its own: the sign of each weight, and a scale per output row."""

    packed: NDArray[np.int8]  # [N, K]
    scales: NDArray[np.float32]  # [N]
    shape: tuple[int, int]
    transposed: bool = False
    scheme: str = field(default="signs", init=False)
    bits: int = field(default=1, init=False)
    PARTS = NEEDED = ("packed", "scales")

    def __post_init__(self) -> None:
        expect("packed", self.packed, np.int8, self.shape)
        expect("scales", self.scales, np.float32, self.shape[:1])

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.shape[1]

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"packed": self.packed, "scales": self.scales}

    @classmethod
    def assemble(cls, parts: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> SignTensor:
        return cls(parts["packed"], parts["scales"], two(record["shape"]), record["transposed"])

    def rows(self, index: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        return self.packed[index] * self.scales[index, None]

    def product(self, b: Graph, name: str, weight_name: str, x: Value, bias: Value | None = None) -> Value:
        whole = b.op("Cast", b.weight(f"{weight_name}.packed", self.packed), name=f"{name}.cast", to=1)
        signs = b.op("Transpose", whole, name=f"{name}.signs", perm=[1, 0])
        y = b.op("MatMul", x, signs, name=f"{name}.product")
        y = b.op("Mul", y, b.weight(f"{weight_name}.scales", self.scales), name=f"{name}.scaled")
        return y if bias is None else b.op("Add", y, bias, name=f"{name}.bias_add")

    def gather(self, b: Graph, name: str, weight_name: str, ids: Value) -> Value:
        rows = b.op("Gather", b.weight(f"{weight_name}.packed", self.packed), ids, name=f"{name}.rows")
        scales = b.op("Gather", b.weight(f"{weight_name}.scales", self.scales), ids, name=f"{name}.scales")
        scales = b.op("Unsqueeze", scales, b.ints(-1), name=f"{name}.column")
        return b.op("Mul", b.op("Cast", rows, name=f"{name}.cast", to=1), scales, name=name)


def signs(array: NDArray[np.float32]) -> SignTensor:
    scales = np.abs(array).mean(1).astype(np.float32)
    return SignTensor(np.where(array < 0, -1, 1).astype(np.int8), scales, (array.shape[0], array.shape[1]))


def test_a_storage_form_is_one_class(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(signs, 1, SignTensor, Rounding.NONE, blocks=False, zero_points=False)
    monkeypatch.setitem(SCHEMES, "signs", scheme)
    quantized, device = str(tmp_path / "quantized"), str(tmp_path / "device")
    assert main(["quantize", str(tiny_gpt2), quantized, "--scheme", "signs"]) == 0
    assert main(["onnx", quantized, device]) == 0  # within float rounding of torch, and every stored number equal
    with runtime.load(device) as model:
        assert model.log_probs([5, 6, 7]).shape == (3, model.vocab_size)


@dataclass
class WithConfidence(TrainOptions):
    confidence_coef: float = opt(0.0, "a gate is sure of its choice")


def confidence(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Mean entropy of the leaves' gate weights."""
    if batch.log_w is not None:
        yield "", -(batch.log_w.exp() * batch.log_w).sum(0).mean()


def test_a_loss_is_one_function_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "confidence", confidence)
    model = random_model([2], 4)
    ids = torch.arange(24).reshape(2, 12)
    values = {one.name: getattr(TrainOptions(), one.name) for one in fields(TrainOptions)}
    plain = Objective(model, WithConfidence(**values))(ids)
    loss = Objective(model, WithConfidence(**values, confidence_coef=0.5))(ids)
    hidden = model.hidden(ids[:, :-1])
    share = torch.softmax(hidden.gates["root"] / model.config.gate_temp, -1)
    entropy = -(share * share.log()).sum(-1).mean()
    assert "confidence" not in plain.terms
    torch.testing.assert_close(loss.terms["confidence"], entropy.detach())
    torch.testing.assert_close(loss.total, plain.total + 0.5 * entropy)


def test_a_peer_is_one_module_and_one_entry(
    tiny_gpt2: Path, sample_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = registry.Peer("tests.helpers.bench_fakes", ("good",), ("numpy",), "pip install here")
    monkeypatch.setitem(registry.PEERS, "new", peer)
    text = tmp_path / "text.txt"
    text.write_text(sample_text, encoding="utf-8")
    entry = Entry("new", str(tiny_gpt2), scheme="good", peer="new")
    (row,) = compare([entry], [text], None, Settings(prompt=8, gen=4, repetitions=2, threads=1)).rows
    assert row.kind == "peer"
    assert row.quality is not None
    assert row.speed is not None


def first_line(paths: list[Path], tokenizer: Any, eot: int, field_name: str) -> Text:
    """A protocol's reading of files: the first line that is not empty."""
    line = next(line for line in paths[0].read_text(encoding="utf-8").splitlines() if line.strip())
    return spans(line, tokenizer.encode(line))


def test_a_protocol_is_one_function_and_one_entry(
    tiny_gpt2: Path,
    sample_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    protocol = Protocol(first_line, lambda length: length, beginning=True)  # type: ignore[arg-type]
    monkeypatch.setitem(protocols.PROTOCOLS, "first-line", protocol)
    text = tmp_path / "text.txt"
    text.write_text(sample_text, encoding="utf-8")
    assert main(["eval", str(tiny_gpt2), "--data", str(text), "--protocol", "first-line"]) == 0
    assert "(first-line, windows of" in capsys.readouterr().out
