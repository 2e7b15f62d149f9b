"""Head rows on candidates: the exported operators against the dequantized rows; and the export's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from onnx import load

from dmpt_export.check.tolerances import EXACT, TOLERANCES
from dmpt_export.cli.main import main
from dmpt_export.cli.onnx import command as onnx_command
from dmpt_export.graph.assemble import OPSET, OPSETS
from dmpt_export.graph.rescore import REST, TOP, groups
from dmpt_export.onnx.export import export_onnx
from dmpt_export.onnx.exportable import ExportOptions
from quant.checkpoint import dequantized_model, save_quantized
from quant.reference import low_memory_model
from quant.schemes import SCHEMES
from tests.helpers.candidates import scored_candidates
from tests.helpers.models import random_model, saved_model
from training.errors import InputError, ValidationError

VOCAB = 41


def logits(
    scheme: str | None, block: int, width: int, k: int, n: int, exact: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(from the operators, from dequantized rows, sum of |x w|), each [n, 3, k], for one leaf with four heads."""
    config = random_model([], 4, n_embd=width, n_head=1, vocab_size=VOCAB, fast_k=k).config
    rng = np.random.default_rng(width + k)
    arrays = {f"heads.{j}.weight": rng.normal(size=(VOCAB, width)).astype(np.float32) for j in range(4)}
    options = {"block": block} if scheme and SCHEMES[scheme].blocks else {}
    weights: dict[str, Any] = {name: SCHEMES[scheme](a, **options) if scheme else a for name, a in arrays.items()}
    assert groups(config, weights, "root") == [[1, 2, 3]]
    x, c, got = scored_candidates(config, weights, rng, n, 3, exact)
    matrices = [weights[f"heads.{j}.weight"] for j in (1, 2, 3)]
    rows = np.stack([(m.dequantize() if scheme else m)[c] for m in matrices], axis=1).astype(np.float64)
    return got, np.einsum("njke,ne->njk", rows, x), np.abs(rows).sum(-1) * np.abs(x).max(-1, initial=0)[:, None, None]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scheme", [None, "int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize(
    ("block", "width", "k", "n"),
    [(32, 64, 7, 1), (16, 40, 5, 3), (128, 24, 1, 2), (16, 72, VOCAB, 2), (32, 64, 7, 0)],
)
def test_candidates_get_the_logits_of_the_dequantized_rows(
    scheme: str | None, block: int, width: int, k: int, n: int, exact: bool
) -> None:
    got, want, size = logits(scheme, block, width, k, n, exact)
    # h loses at most a step of its rest, a (TOP * REST)th of the largest value; 4 bits: of x - y / 16, both halves
    limit = 1e-5 if exact or scheme is None else 3 / (TOP * REST)
    assert got.shape == want.shape
    assert (np.abs(got - want) <= limit * size + 1e-5).all()


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_lean_reference_is_the_dequantized_model(scheme: str, tied: bool, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [2], 4, fast_k=9, tie_word_embeddings=tied)
    save_quantized(source, tmp_path / "quantized", scheme=scheme)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        for folder in (source, tmp_path / "quantized"):
            for k in (None, 9):
                want = dequantized_model(folder).log_probs(ids, fast_k=k)
                torch.testing.assert_close(low_memory_model(folder).log_probs(ids, fast_k=k), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_offered_works(opset: int, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [1, 2], 8, fast_k=16, head_topk=1)
    save_quantized(source, tmp_path / "quantized", scheme="int4")
    assert export_onnx(tmp_path / "quantized", tmp_path / "onnx", ExportOptions(opset=opset))["opset"] == opset
    assert load(tmp_path / "onnx" / "model.onnx", load_external_data=False).opset_import[0].version == opset


def test_atol_replaces_the_tables_limit(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", [2], 4, fast_k=9)
    assert export_onnx(source, tmp_path / "onnx", ExportOptions(atol=1e-3))["parity"]["tolerance"]["max_abs"] == 1e-3
    with pytest.raises(ValidationError, match="allowed 1e-12"):
        export_onnx(source, tmp_path / "other", ExportOptions(atol=1e-12))
    for nothing in (float("nan"), float("inf"), 0.0, -1e-3):
        with pytest.raises(InputError, match=f"atol {nothing} must be"):
            export_onnx(source, tmp_path / "other", ExportOptions(atol=nothing))
    with pytest.raises(InputError, match="opset 19"):
        export_onnx(source, tmp_path / "other", ExportOptions(opset=19))
    assert not (tmp_path / "other").exists()


def test_the_command_offers_what_the_library_takes() -> None:
    """Its help is shown without importing what knows these."""
    options = {option.name: option for option in onnx_command.params}
    kind = options["opset"].type
    assert isinstance(kind, click.IntRange)
    assert (kind.min, kind.max, options["opset"].default) == (OPSETS[0], OPSETS[-1], OPSET)
    assert f"table's, {TOLERANCES[EXACT].max_abs:.0e}.".replace("e-0", "e-") in str(options["atol"].help)  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [["--opset", "19"], ["--atol", "0"], ["--atol", "1e-4", "--no-verify"],
                                     ["--atol", "1e-4", "--target", "cuda"]])  # fmt: skip
def test_impossible_options_are_wrong_usage(options: list[str], tmp_path: Path) -> None:
    assert main(["onnx", "nothing", str(tmp_path / "onnx"), *options]) == 2
