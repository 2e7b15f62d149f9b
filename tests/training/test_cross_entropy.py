"""Compare the fused head with log_softmax: values, gradients, bfloat16, a frozen head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.helpers.tolerances import TOLERANCE
from training.loop.cross_entropy import ROWS, head_gold

ATOL = TOLERANCE["float32", "loss"]


def test_head_gold_equals_log_softmax_and_its_gradients() -> None:
    rows = 2 * ROWS["cpu"] + 3  # several slices, the last a short one
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).requires_grad_()
    labels, upstream = torch.randint(0, 50, (rows,), generator=generator), torch.randn(rows, generator=generator)
    expected = F.log_softmax(h @ weight.T, -1).gather(-1, labels[:, None])[:, 0]
    wanted = torch.autograd.grad(expected, (h, weight), upstream)
    got = head_gold(h, weight, labels)
    assert torch.allclose(got, expected, atol=ATOL)
    for mine, theirs in zip(torch.autograd.grad(got, (h, weight), upstream), wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=ATOL)


def test_head_gold_in_bfloat16_stays_near_and_gives_float32_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 16, generator=generator).requires_grad_()
    weight = torch.randn(30, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 30, (40,), generator=generator)
    exact = torch.autograd.grad(head_gold(h, weight, labels).sum(), (h, weight))
    with torch.autocast("cpu", torch.bfloat16):
        got = head_gold(h, weight, labels)
    rough = torch.autograd.grad(got.sum(), (h, weight))
    assert got.dtype == torch.float32
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert 0 < (a - b).norm() / a.norm() < 0.02


def test_a_frozen_head_passes_the_gradient_on_without_one_of_its_own() -> None:
    h, weight = torch.randn(4, 8).requires_grad_(), torch.randn(9, 8)
    head_gold(h, weight, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert h.grad is not None
    assert weight.grad is None
