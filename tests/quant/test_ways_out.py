"""What would fit when no plan does: estimates equal the bytes that quantizing stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quant.checkpoint import save_quantized
from quant.planning.groups import CANDIDATES, candidates_of, groups_of
from quant.planning.ways_out import estimate, ways_out, with_projected_heads
from quant.rules import anchors_of, parse_rule
from quant.schemes.low_rank import DELTAS
from tests.helpers.models import saved_model
from training.checkpoints.checkpoint import load_state, read_config
from training.errors import InputError


@pytest.mark.parametrize("scheme", ["int8", "int8:64", "int4:32", "int4:128", "int2:64", "int3:32"])
def test_an_estimate_is_what_is_stored(scheme: str, tiny_dmpt: Path) -> None:
    reports = save_quantized(tiny_dmpt, None, scheme)
    _, arrays = load_state(tiny_dmpt)
    for report in reports:
        if report.scheme != "float32":
            rule = parse_rule(f"*={report.scheme}:{report.block}")
            assert estimate(rule, report.name, arrays[report.name].shape, 1) == report.bytes_after, report.name


def test_an_estimate_of_deltas_is_what_is_stored(tiny_dmpt: Path) -> None:
    reports = save_quantized(tiny_dmpt, None, "int8", [parse_rule("heads.*=delta-r16")])
    _, arrays = load_state(tiny_dmpt)
    deltas = [report for report in reports if report.scheme == "delta-r16"]
    estimates = [estimate(parse_rule("*=delta-r16"), d.name, arrays[d.name].shape, 1) for d in deltas]
    assert estimates == [delta.bytes_after for delta in deltas]
    assert deltas


def test_smaller_candidates_are_named_with_their_size(tiny_dmpt: Path) -> None:
    config, arrays = load_state(tiny_dmpt)
    shapes = {name: array.shape for name, array in arrays.items()}
    groups = groups_of(shapes, anchors_of(config))
    said, _, projected = ways_out(groups, shapes, 60_000, 110_000).partition(". Projected heads ")
    assert said.startswith("least sizes with other candidates: ")
    assert projected.startswith("(dmpt-export convert --heads projected) and int4-gptq:128: 0.")
    sizes = [float(part.split(": ")[1].split(" MB")[0]) for part in said.split("candidates: ")[1].split("; ")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) >= 2
    assert [part.endswith("fits") for part in said.split("; ")] == [size <= 0.06 for size in sizes]
    assert ways_out(groups, shapes, 10, 100) == "no other candidates are smaller"


def test_the_size_with_projected_heads_is_what_is_stored(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "full", [2], 6, fast_k=16)
    _, arrays = load_state(source)
    shapes = {name: array.shape for name, array in arrays.items()}
    projected = saved_model(tmp_path / "projected", [2], 6, fast_k=16, head_kind="projected")
    reports = save_quantized(projected, None, "int4:128")
    groups = groups_of(shapes, anchors_of(read_config(source)))
    assert with_projected_heads(groups, shapes) == sum(report.bytes_after for report in reports)
    assert with_projected_heads(groups_of(shapes, {}), shapes) is None  # no head that is not an anchor


def test_the_error_shows_the_way_out(tiny_dmpt: Path, text: Path, tmp_path: Path) -> None:
    from dmpt_export.requests.quantize import QuantizeRequest

    request = QuantizeRequest(
        str(tiny_dmpt), str(tmp_path / "out"), target_bits=4.0, candidates="int8", calib=str(text)
    )
    with pytest.raises(InputError, match=r"with candidates int8 the least is .* int4-gptq:128: 0\.\d+ MB"):
        request.check()


def test_shapes_of_any_kind_are_estimated() -> None:
    assert estimate(parse_rule("*=fp16"), "heads.0.weight", (7, 33), 1) == 7 * np.float16().nbytes * 33


def test_default_candidates_are_limited_to_ranks_that_the_heads_have(tiny_dmpt: Path) -> None:
    """32 wide with one further head of a leaf: no delta of rank 64."""
    config, arrays = load_state(tiny_dmpt)
    groups = groups_of({name: array.shape for name, array in arrays.items()}, anchors_of(config))
    heads = [group for group in groups if group.anchor is not None]
    assert heads
    for group in heads:
        assert group.rank == 32 * len(group.tensors)
        assert [name for name in candidates_of(group, CANDIDATES) if name in DELTAS] == ["delta-r16"]
    with pytest.raises(InputError, match="can store"):
        candidates_of(heads[0], "delta-r64")
