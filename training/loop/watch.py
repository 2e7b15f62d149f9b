"""Monitoring of a run: progress bar, metrics.jsonl, warnings, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.loop.losses import Across, alone
from training.loop.objective import Loss
from training.progress import Bar

COLLAPSED = 0.05  # warn about a path below this share of the tokens ...
PARTS = (".sum", ".count")  # of a mean over what was counted, which may be nothing in some passes
PATIENCE = 3  # ... for this many log lines in a row


class Meter:
    """Running sums since the last log line; means are over forward passes. The sums survive a resume."""

    def __init__(self, sums: dict[str, float] | None = None, across: Across = alone) -> None:
        """across: the mean over processes, so that every process has the whole batch's values."""
        self.sums: dict[str, float] = defaultdict(float, sums or {})
        self.across = across
        self._pending: list[dict[str, Tensor]] = []

    def add(self, loss: Loss) -> None:
        """Add one forward pass. Values stay on the device until they are read."""
        values = {"loss": loss.total.detach(), **loss.terms}
        if loss.routes is not None:
            values |= {f"route.{i}": share for i, share in enumerate(loss.routes)}
        values |= loss.choices
        if loss.switch_share is not None:
            values["switch_share"] = loss.switch_share
        for leaf, usage in loss.heads.items():
            values |= {f"head.{leaf}.{i}": share for i, share in enumerate(usage)}
        self._pending.append(values)

    def flush(self) -> dict[str, float]:
        """Add pending values to the sums (one transfer per pass); returns the newest pass's values."""
        newest: dict[str, float] = {}
        for values in self._pending:
            whole = self.across(torch.stack(list(values.values())).float())
            newest = dict(zip(values, whole.tolist(), strict=True))
            for name, value in newest.items():
                self.sums[name] += value
            self.sums["passes"] += 1
        self._pending.clear()
        return newest

    def means(self) -> dict[str, float]:
        """Means since the last reset."""
        self.flush()
        passes = self.sums.get("passes", 0)
        if not passes:
            return {}
        means = {n: total / passes for n, total in self.sums.items() if n != "passes" and not n.endswith(PARTS)}
        for name in (n.removesuffix(".sum") for n in self.sums if n.endswith(".sum")):
            if count := self.sums[f"{name}.count"]:
                means[name] = self.sums[f"{name}.sum"] / count
        return means

    def reset(self) -> None:
        self.sums.clear()


class Watcher:
    """Writes metrics and shows progress, in the main process only; without a title there is no bar."""

    def __init__(
        self, out: Path, leaves: list[str], total: int, start: int, title: str | None, main: bool, board: bool
    ) -> None:
        self.leaves, self.main, self.path = leaves, main, out / "metrics.jsonl"
        self.bar: tqdm[Any] = Bar(
            total=total, initial=start, desc=title, unit="step", disable=None if main and title else True, leave=True
        )
        self.low = dict.fromkeys(leaves, 0)  # consecutive log lines with a nearly unused leaf
        self.tokens, self.since = 0, time.monotonic()
        self.board = tensorboard(out, start) if board and main else None
        if main:
            truncate(self.path, start)

    def step(self, tokens: int, loss: float, meter: Meter) -> None:
        """Call after every optimizer step: `tokens` is the number trained on, `loss` the newest nll."""
        self.tokens += tokens
        self.bar.update()
        if self.bar.disable:
            return
        seen: dict[str, str] = {"loss": f"{loss:.3f}", "ppl": f"{perplexity(loss):.1f}"}
        shares = [meter.sums[f"route.{i}"] for i in range(len(self.leaves)) if f"route.{i}" in meter.sums]
        if shares:  # none without a fork
            passes = meter.sums["passes"]
            seen["routes"] = " ".join(f"{leaf} {n / passes:.0%}" for leaf, n in zip(self.leaves, shares, strict=True))
        seen["tok/s"] = f"{self.tokens / max(time.monotonic() - self.since, 1e-9):.0f}"
        self.bar.set_postfix(seen, refresh=False)

    def log(self, step: int, meter: Meter, **more: float) -> dict[str, Any]:
        """Write the means since the last log line, and reset them."""
        means, now = meter.means(), time.monotonic()
        meter.reset()
        record: dict[str, Any] = {"step": step, "perplexity": perplexity(means["nll"]), **more}
        record |= {name: value for name, value in means.items() if not name.startswith(("route.", "head."))}
        record["tokens_per_s"] = round(self.tokens / max(now - self.since, 1e-9), 1)
        routes = {leaf: means[f"route.{i}"] for i, leaf in enumerate(self.leaves) if f"route.{i}" in means}
        heads: dict[str, list[float]] = {}
        for name, value in means.items():
            if name.startswith("head."):
                heads.setdefault(name.split(".")[1], []).append(value)
        self.write(record | ({"routes": routes} if routes else {}) | ({"heads": heads} if heads else {}))
        self.tokens, self.since = 0, now
        for leaf, share in routes.items():
            self.low[leaf] = self.low[leaf] + 1 if share < COLLAPSED else 0
            if self.low[leaf] == PATIENCE:
                self.warn(
                    step,
                    f"routing collapse: path '{leaf}' gets {share:.1%} of the tokens; raise --lb-coef, "
                    "or lower --switch-coef if it is set",
                )
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl. Numbers that JSON cannot hold (infinities) become null."""
        if not self.main:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        if self.board is not None:
            for name, value in scalars(clean):
                self.board.add_scalar(name, value, record["step"])

    def warn(self, step: int, message: str) -> None:
        self.write({"step": step, "warning": message})
        self.say(f"Warning (step {step}): {message}")

    def say(self, message: str) -> None:
        """Print one line on stderr, without breaking the bar."""
        if self.main:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()


def perplexity(loss: float) -> float:
    """exp(loss); infinity on overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and an incomplete last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of a record except its step; nested values are named NAME/KEY, lists NAME/KEY/INDEX."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in scalars(value))
        elif isinstance(value, list):
            yield from ((f"{name}/{index}", number) for index, number in enumerate(value))
        elif isinstance(value, (int, float)) and name != "step":
            yield name, value


def tensorboard(out: Path, start: int) -> Any:
    """A TensorBoard writer for OUT/tensorboard that replaces entries after step `start`.

    TrainOptions.check_installed() has already reported a missing package.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=start + 1 if start else None)
