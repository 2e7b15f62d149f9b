"""Reuse an earlier plan; it is read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.rules import Rule, parse_rule
from quant.schemes import SCHEMES
from training.checkpoints.files import read_json
from training.errors import FieldError, InputError

if TYPE_CHECKING:
    from quant.calibration import Calibration


@dataclass(frozen=True)
class Replay:
    """The rules of an earlier plan, to be reused."""

    path: Path
    rules: list[Rule]
    calibration: dict[str, Any]  # sha256 and tokens of the plan's text; {} if not recorded
    smooth: float | None = None  # how strongly it balanced activations
    balanced: tuple[str, ...] = ()  # against these weights

    @property
    def by_text(self) -> str | None:
        """What needs calibration text in the plan, if anything: a scheme, or smoothing."""
        schemes = (rule.scheme for rule in self.rules)
        needing = (scheme for scheme in schemes if scheme in SCHEMES and SCHEMES[scheme].calibrated)
        return next(needing, None if self.smooth is None else "smoothing")

    def check_text(self) -> None:
        """Raise InputError when the plan needs calibration text; for requests without any, before other work."""
        if self.by_text and self.calibration:
            raise FieldError("{}, and {} needs it: give the same text with {calib}", self.made(), self.by_text)

    def other_text(self, given: Calibration) -> str | None:
        """A warning when text is needed and differs from the plan's; else None."""
        text = (given.sha256, given.windows.numel())
        if not self.by_text or not self.calibration or text == (self.calibration["sha256"], self.calibration["tokens"]):
            return None
        return f"{self.made()}, not with these {text[1]} of {text[0][:12]}...: the weights will differ from the plan's"

    def made(self) -> str:
        tokens, sha256 = self.calibration["tokens"], self.calibration["sha256"]
        return f"{self.path} was made with {tokens} tokens of a text with sha256 {sha256[:12]}..."


def read_plan(path: str | Path) -> Replay:
    """Read a plan.json. Raises InputError for any other file."""
    fields = read_json(Path(path))
    rules, text = fields.get("rules"), fields.get("calibration") or {}
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, str) for rule in rules):
        raise InputError(f"{path} is not a plan: give the plan.json of a planned quantized folder")
    if text and not (isinstance(text, dict) and type(text.get("sha256")) is str and type(text.get("tokens")) is int):
        raise InputError(f"{path}: calibration must give sha256 and tokens: give the plan.json unchanged")
    smooth = fields.get("smooth")
    if smooth is not None and not (type(smooth) in (float, int) and 0 <= smooth <= 1):
        raise InputError(f"{path}: smooth {smooth!r} must be from 0 to 1: give the plan.json unchanged")
    balanced = fields.get("balanced", [])
    if not isinstance(balanced, list) or not all(isinstance(name, str) for name in balanced):
        raise InputError(f"{path}: balanced must list names of tensors: give the plan.json unchanged")
    return Replay(Path(path), [parse_rule(rule) for rule in rules], text, smooth, tuple(balanced))
