"""A model's configuration as it is deployed. Imports nothing heavy: what cannot be exported is said at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from training.model.shape import Shape

S = TypeVar("S", bound="Shape")


def deployed(config: S, fast_k: int | None, head_topk: int | None) -> S:
    """`config`, with fast_k and head_topk set where they are given; InputError where that cannot be exported."""
    if fast_k is not None:
        config.fast_k = fast_k or None
    if head_topk is not None:
        config.head_topk = head_topk or None
    config.check()
    config.check_exportable()
    return config
