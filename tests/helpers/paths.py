"""Paths of the repository and of shared data beside it."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"  # texts and tokenizers; tests that need them skip without
