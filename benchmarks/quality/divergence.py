"""Divergence of a model's distributions from those of a base model, as in llama.cpp's perplexity tool.

KL(base || model) of every scored token, how often both have the same top token, and the mean of the paired log-ratio
of perplexities, ln(PPL(model) / PPL(base)), with its standard error: the difficulty of a token is the same for both and
cancels. Source: tools/perplexity of llama.cpp, `--kl-divergence`.

The base's log-probs can be cached: one folder per base, text and protocol, named by a hash of everything that
determines them, with one file per window. A value takes two bytes (28 GB in all for WikiText's test text at GPT-2's
vocabulary, which must be free before the run): the square root of its distance from the row's largest, in 65,535 steps
of the row's range. At a range of 30 nats the largest error is 2.3e-4 x sqrt(distance) nats, so the likely tokens, which
dominate a KL, are the most exact; the largest value of a row is exact.
"""

from __future__ import annotations

import errno
import hashlib
import math
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.progress import fingerprint, key_of, read_arrays
from benchmarks.quality.scorer import Scorer, Window, pieces
from training.checkpoints.atomic import atomic_file
from training.errors import InputError, ValidationError

STEPS = 65_535  # of a row's range, in two bytes
NEVER = np.float32(100)  # nats: e^-100 counts as zero probability
FORMAT = 1
SPARE = 64 << 20  # bytes left free on the disk

Float = NDArray[np.float32]
NO_ROWS: tuple[Float, Float] = (np.zeros((0, 0), np.float32), np.zeros(0, np.float32))


def pack(log_probs: Float) -> tuple[NDArray[np.uint16], Float]:
    """Log-probs [n, V] -> codes [n, V] and (largest, range) of each row [n, 2].

    Minus infinity becomes the lowest code, which then is NEVER nats or more below the largest.
    """
    top = log_probs.max(-1)
    finite = np.where(np.isfinite(log_probs), log_probs, top[:, None])
    span = np.where(np.isneginf(log_probs).any(-1), NEVER, np.float32(0))
    span = np.maximum(span, top - finite.min(-1))
    share = np.sqrt((top[:, None] - finite) / np.where(span > 0, span, 1)[:, None])
    codes = np.rint(share * STEPS).astype(np.uint16)
    codes[np.isneginf(log_probs)] = STEPS
    return codes, np.stack([top, span], axis=1).astype(np.float32)


def unpack(codes: NDArray[np.uint16], rows: Float) -> Float:
    """Inverse of pack() up to rounding: float32 [n, V]."""
    share = codes.astype(np.float32) / np.float32(STEPS)
    return np.asarray(rows[:, :1] - share * share * rows[:, 1:], np.float32)


def kl_divergence(base: Float, model: Float) -> NDArray[np.float64]:
    """KL(base || model) of rows [n, V] -> [n], in nats. The base's rows must sum to one up to rounding."""
    p = np.exp(base)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (base - model), 0)  # 0 log 0 is 0
    mass = p.sum(-1, dtype=np.float64)
    return np.asarray(terms.sum(-1, dtype=np.float64) / mass - np.log(mass), np.float64)


class Base:
    """The base's log-probs, computed or read from the cache, one window at a time."""

    def __init__(self, scorer: Scorer, cache: str | Path | None = None) -> None:
        """cache: folder for the log-probs; None: no cache."""
        self.scorer, self.cache = scorer, Path(cache) if cache else None
        self.folder: Path | None = None  # of this base, text and protocol
        self.key = ""
        self.queue: deque[tuple[int, Window, NDArray[np.integer]]] = deque()
        self.rows = NO_ROWS

    def prepare(self, facts: Mapping[str, Any], plan: Sequence[tuple[int, int, int]]) -> int:
        """Bytes that the cache will hold for the windows of a text; facts: identify text and protocol.

        Raises OSError when the missing part does not fit the disk.
        """
        self.key = key_of(format=FORMAT, model=fingerprint(self.scorer) if self.cache else "", **facts)
        if self.cache is None:
            return 0
        self.folder = self.cache / f"base-{self.key}"
        sizes = [n * (2 * self.scorer.vocab_size + 12) for _, _, n in plan]
        missing = sum(size for i, size in enumerate(sizes) if not self.file(i).is_file())
        above = next(path for path in self.folder.resolve().parents if path.exists())
        free = shutil.disk_usage(above).free
        if missing and missing + SPARE > free:
            raise OSError(
                errno.ENOSPC,
                f"the base's log-probs need {missing / 1e6:.0f} MB more in {self.cache}, where {free / 1e6:.0f} MB are "
                f"free and {SPARE / 1e6:.0f} MB must stay free; without a cache the base runs each time",
            )
        return sum(sizes)

    def file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"window-{number:06d}.npz"

    def start(self, number: int, windows: Sequence[Window], targets: Sequence[NDArray[np.integer]]) -> None:
        """Make take() continue with these windows, the first of which has index `number` in the text."""
        self.queue = deque(zip(range(number, number + len(windows)), windows, targets, strict=True))
        self.rows = NO_ROWS  # left over from a failed evaluation

    def take(self, n: int) -> tuple[Float, Float]:
        """(log-probs [n, V], log-probs of the targets [n]) of the next rows, all from one window."""
        if not len(self.rows[1]):
            self.rows = self.window(*self.queue.popleft())
        log_probs, gold = self.rows
        self.rows = log_probs[n:], gold[n:]
        return log_probs[:n], gold[:n]

    def window(self, number: int, window: Window, targets: NDArray[np.integer]) -> tuple[Float, Float]:
        """All rows of one window.

        Raises InputError for a damaged cache, ValidationError for a base without a perplexity, OSError for a full disk.
        """
        file = self.file(number) if self.folder is not None else None
        if file is not None and file.is_file():
            return self._read(file, window, targets)
        found = np.concatenate([piece.log_probs.copy() for piece in pieces(self.scorer, [window])])
        gold = found[np.arange(len(targets)), targets]
        if not np.isfinite(gold).all():
            bad = int(targets[np.flatnonzero(~np.isfinite(gold))[0]])
            raise ValidationError(
                f"{self.scorer.name} gives token {bad} of the text probability 0: it cannot be a base"
            )
        if file is None:
            return found, gold
        codes, rows = pack(found)
        with atomic_file(file) as tmp, open(tmp, "wb") as out:
            np.savez(out, codes=codes, rows=rows, gold=gold, window=window_digest(window, targets))
        return unpack(codes, rows), gold  # the same numbers as when read back

    def _read(self, file: Path, window: Window, targets: NDArray[np.integer]) -> tuple[Float, Float]:
        hint = f"delete {file.parent} and run again"
        codes, rows, gold, digest = read_arrays(file, ("codes", "rows", "gold", "window"), hint)
        if not np.array_equal(digest, window_digest(window, targets)):
            raise InputError(f"{file} holds the log-probs of a different window than its name says: {hint}")
        n = len(targets)
        if gold.shape != (n,) or not np.isfinite(rows).all() or not np.isfinite(gold).all():
            raise InputError(f"{file} is damaged: {hint}")
        if codes.dtype != np.uint16 or codes.shape != (n, self.scorer.vocab_size) or rows.shape != (n, 2):
            raise InputError(f"{file} does not hold {n} rows of {self.scorer.vocab_size} log-probs: {hint}")
        return unpack(codes, rows), gold

    def close(self) -> None:
        self.scorer.close()


def check_base(scorer: Scorer, base: Scorer, ids: NDArray[np.integer], base_ids: NDArray[np.integer]) -> None:
    """Raise InputError unless both models turn the text into the same tokens of the same vocabulary."""
    if scorer.vocab_size != base.vocab_size:
        raise InputError(
            f"{base.name} has {base.vocab_size} tokens, {scorer.name} {scorer.vocab_size}: KL needs models with "
            "the same vocabulary; compare perplexity per word or bits per byte instead"
        )
    if not np.array_equal(ids, base_ids):
        raise InputError(
            f"the tokenizers of {base.name} and {scorer.name} give different tokens for the text: KL needs models with "
            "the same tokenizer; compare perplexity per word or bits per byte instead"
        )


def window_digest(window: Window, targets: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Identifies a window: hash of its tokens and targets, uint8 [32]."""
    parts = (np.asarray(part, dtype="<i8").tobytes() for part in (window[0], targets))
    return np.frombuffer(hashlib.sha256(b"|".join(parts)).digest(), np.uint8)


def statistics(
    name: str, kl: NDArray[np.float64], same_top: NDArray[np.bool_], nll: NDArray[np.float64],
    base_nll: NDArray[np.float64],
) -> dict[str, Any]:  # fmt: skip
    """All figures of a comparison, from values per token. Standard errors treat tokens as independent."""
    ratio, n = nll - base_nll, len(nll)
    if not np.isfinite(kl).all():
        raise ValidationError(
            f"the model gives probability 0 to a token that is possible for {name}: its KL is infinite"
        )
    agreement = float(same_top.mean())
    return {
        "model": name,
        "perplexity": math.exp(min(base_nll.mean(), 700.0)),
        "kl_mean": float(kl.mean()),
        "kl_mean_error": standard_error(kl),
        "kl_median": float(np.median(kl)),
        "kl_99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": agreement,
        "top1_agreement_error": math.sqrt(agreement * (1 - agreement) / n),
        "log_ratio": float(ratio.mean()),
        "log_ratio_error": standard_error(ratio),
    }


def standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
