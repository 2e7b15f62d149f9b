"""Float checkpoint -> quantized checkpoint, by a scheme and rules, an earlier plan, or a plan for a target."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmpt_export.extras import require
from training.errors import OptionError, usage
from training.progress import say, tell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quant.calibration import Calibration
    from quant.planning.plan import Plan, Target
    from quant.planning.saved_plan import Replay
    from quant.quantize import TensorReport
    from quant.rules import Rule
    from training.model.shape import Shape


SIZE, SPEED = "size", "speed"


@dataclass(frozen=True)
class Found:
    """Everything that check() read."""

    rules: list[Rule]  # the given ones, then those of the earlier plan
    earlier: Replay | None
    ids: NDArray[np.int64] | None = None  # [n, S], windows of the calibration text


@dataclass(frozen=True)
class Quantized:
    """The outcome of quantizing."""

    reports: Sequence[TensorReport]  # one per tensor
    plan: Plan | None  # if one was made


@dataclass(frozen=True)
class QuantizeRequest:
    checkpoint: str  # DMPT folder, or GPT-2 folder or hub id
    out: str | None = None  # folder; None only with dry_run
    scheme: str | None = None  # of quant.schemes
    vocab_scheme: str | None = None  # of the embedding and the heads; None: what suits the scheme
    block: int | None = None  # weights that share a scale; None: the scheme's default
    asymmetric: bool = False  # with a zero point for each block
    rules: tuple[str, ...] = ()  # PATTERN=SCHEME[:BLOCK][:asymmetric], the first match wins
    calib: str | None = None  # text file
    calib_tokens: int = 8192  # number of its tokens to use
    smooth: float | None = None  # 0 (weights unchanged) to 1
    target_size: int | None = None  # bytes of the weights' file
    target_kl: float | None = None  # nats per token on the calibration text
    target_bits: float | None = None  # per weight, counting all tensors
    candidates: str | None = None  # comma-separated schemes; None: those of `prefer` in quant.planning.groups
    prefer: str = SIZE  # within target_kl the smallest model, or SPEED: as much as possible in int8-dynamic
    plan: str | None = None  # plan.json of an earlier plan
    dry_run: bool = False  # nothing is written
    cache_dir: Path | None = None  # cache of measured damages; None: the user's cache
    overwrite: bool = False  # an earlier result in `out` is replaced

    @property
    def planned(self) -> bool:
        return any(target is not None for target in (self.target_size, self.target_kl, self.target_bits))

    @property
    def storage(self) -> str | None:
        """Scheme, block and zero points as in a rule."""
        if not self.scheme:
            return None
        options = (str(self.block or ""), "asymmetric" if self.asymmetric else "")
        return ":".join([self.scheme, *filter(None, options)])

    def check(self) -> Found:
        """Raise OptionError for fields that exclude each other; then, before torch is imported, InputError for an
        unusable model, `out` or text, and for rules that do not fit."""
        self.check_fields()
        self.check_schemes()
        require("train")
        return self.check_files()

    def check_fields(self) -> None:
        if self.out is None and not self.dry_run:
            raise OptionError("Missing argument '{out}': the folder to write.")
        if sum(target is not None for target in (self.target_size, self.target_kl, self.target_bits)) > 1:
            raise OptionError("give one of {target_size}, {target_kl} and {target_bits}")
        chosen = {
            name: getattr(self, name) for name in ("scheme", "vocab_scheme", "block", "asymmetric", "rules", "plan")
        }
        others = [name for name, value in chosen.items() if value is not None and value is not False and value != ()]
        if self.planned and others:
            raise OptionError(
                f"a plan chooses schemes itself: leave out {{{others[0]}}}, or limit its choice with {{candidates}}"
            )
        if self.planned and not self.calib:
            raise OptionError("a plan measures damage on calibration text: give some with {calib}")
        if self.prefer == SPEED and self.target_kl is None:
            raise OptionError("{prefer} speed needs {target_kl}: how much damage it may do")
        if not self.planned and self.candidates is not None:
            raise OptionError("{candidates} need a plan: give {target_size}, {target_kl} or {target_bits}")
        if self.candidates is not None and not all(part.strip() for part in self.candidates.split(",")):
            raise OptionError("{candidates} '{}' has an empty part: give comma-separated schemes", self.candidates)
        if self.vocab_scheme and not self.scheme:
            raise OptionError("{vocab_scheme} needs {scheme}: what the layers get")
        if not self.planned and not self.scheme and not self.plan:
            raise OptionError("give {scheme}, or a target for a plan such as {target_size} 200MB, or {plan} PLAN.json")

    def check_schemes(self) -> None:
        """Raise OptionError for schemes, blocks or rules that are wrong for any model."""
        from quant.planning.groups import check_candidates
        from quant.rules import parse_rule

        with usage():
            self.usual_rules()
            for rule in self.rules:
                parse_rule(rule)
            if self.planned:
                check_candidates(self.choice)
                self.check_dynamic()

    def check_dynamic(self) -> None:
        """Raise OptionError for a plan that is to be fast, or smoothed, without the scheme for it."""
        from quant.rules import DYNAMIC, parse_scheme

        if DYNAMIC in {parse_scheme(part.strip())[0] for part in self.choice.split(",")}:
            return
        if self.prefer == SPEED:
            raise OptionError("{prefer} speed chooses where {} is safe: add it to {candidates}", DYNAMIC)
        if self.smooth is not None:
            raise OptionError("smoothing is for {}: add it to {candidates}, or leave {smooth} out", DYNAMIC)

    def check_files(self) -> Found:
        from quant.planning.plan import check_target
        from quant.planning.saved_plan import read_plan
        from quant.rules import anchors_of, parse_rule, still_needed
        from quant.schemes import check_installed
        from quant.text import read_ids
        from training.checkpoints.folder import float_folder, read_shape, tensor_shapes
        from training.checkpoints.places import check_inputs, check_new, check_place

        calibrated = self.calib is not None
        earlier = read_plan(self.plan) if self.plan else None
        own = [parse_rule(rule, calibrated) for rule in self.rules]
        rules = [*own, *(earlier.rules if earlier else [])]
        if earlier and not calibrated:
            earlier.check_text()
        chosen = [part.strip().partition(":")[0] for part in self.choice.split(",")] if self.planned else []
        check_installed([*filter(None, [self.scheme]), *chosen, *(rule.scheme for rule in rules)])
        if self.out is not None:
            check_new(Path(self.out), "quantized", self.overwrite)
            check_inputs(Path(self.out), self.checkpoint, self.calib, self.plan, self.cache_dir)
        if self.planned:
            check_place(self.cache())
        folder = float_folder(self.checkpoint)
        shape = read_shape(folder)
        shape.check_exportable()
        shapes = tensor_shapes(folder, shape)
        if earlier and shapes:
            rules = [*own, *still_needed(earlier.rules, own, shapes, shape.tie_word_embeddings)]
        if shapes and self.planned:
            check_target(shapes, anchors_of(shape), self.choice, self.target())
        elif shapes:
            self.check_rules(shapes, shape, rules)
        if self.calib is not None:  # last: the tokenizer of a foreign folder takes Transformers, and seconds
            return Found(rules, earlier, read_ids(self.calib, folder, shape, self.calib_tokens))
        return Found(rules, earlier)

    def smoothing(self, earlier: Replay | None) -> tuple[float | None, tuple[str, ...] | None]:
        """How strongly to balance activations, and against which weights (None: those that get int8-dynamic): as asked
        for, else as in the earlier plan, whose weights were chosen and rounded so."""
        if self.smooth is not None or earlier is None or earlier.smooth is None:
            return self.smooth, None
        return earlier.smooth, earlier.balanced

    def check_rules(self, shapes: dict[str, tuple[int, ...]], shape: Shape, rules: list[Rule]) -> None:
        """Raise InputError for rules that do not fit the tensors, OptionError when they lack what they need."""
        from quant.rules import anchors_of, assign, check_text

        chosen = assign(shapes, rules, self.usual_rules(), shape.tie_word_embeddings, anchors_of(shape))
        with usage():
            check_text(chosen, self.calib is not None, self.smooth)

    def usual_rules(self) -> list[Rule]:
        """The scheme's own rules, for tensors that no other rule matches."""
        from quant.rules import default_rules

        return default_rules(self.scheme, self.block, self.asymmetric, self.vocab_scheme) if self.scheme else []

    @property
    def choice(self) -> str:
        """The candidates of a plan."""
        from quant.planning.groups import CANDIDATES, FAST_CANDIDATES

        return self.candidates or (FAST_CANDIDATES if self.prefer == SPEED else CANDIDATES)

    def target(self) -> Target:
        from quant.planning.plan import Target

        return Target(self.target_size, self.target_kl, self.target_bits, self.prefer == SPEED)

    def cache(self) -> Path:
        """The folder for a plan's measured damages."""
        from training.checkpoints.files import cache_folder

        return self.cache_dir.expanduser() if self.cache_dir else cache_folder()

    def run(self, found: Found) -> Quantized:
        """Quantize with the inputs that check() found."""
        from quant.rules import DRAFT, DYNAMIC
        from training.checkpoints.lock import working_in

        writes = self.out is not None and not self.dry_run
        with working_in(str(self.out), "quantize", beside=True) if writes else nullcontext():
            result = self.quantize(found)
        dynamic = any(report.scheme == DYNAMIC for report in result.reports)
        if dynamic and any(DRAFT.fullmatch(report.name) for report in result.reports):
            tell(f"note: with {DYNAMIC} layers the draft heads cannot be used: `run` refuses --speculate")
        return result

    def quantize(self, found: Found) -> Quantized:
        """run() without its note."""
        say("loading PyTorch")
        from benchmarks.report.quantization import report_files
        from quant.calibration import read_calibration
        from quant.checkpoint import save_quantized
        from quant.planning.planned import save_planned

        calibration = None
        if self.calib is not None:
            say(f"reading {self.calib}, and running the float model on it")
            calibration = read_calibration(self.calib, self.checkpoint, self.calib_tokens, found.ids)
            self.judge(calibration, found)
        out = None if self.dry_run else self.out
        if self.planned:
            assert calibration is not None
            say("measuring the damage of each group in each scheme")
            plan, reports = save_planned(
                self.checkpoint, out, self.target(), calibration, self.cache(), self.choice, report_files, self.smooth
            )
            return Quantized(reports, plan)
        say("quantizing" if calibration is None else "quantizing, then measuring the damage of each tensor")
        smooth, balanced = self.smoothing(found.earlier)
        reports = save_quantized(
            self.checkpoint, out, self.storage, found.rules,
            calibration=calibration, smooth=smooth, balanced=balanced,
            files=lambda reports: report_files(reports, None), vocabulary=self.vocab_scheme,
        )  # fmt: skip
        return Quantized(reports, None)

    def judge(self, calibration: Calibration, found: Found) -> None:
        """Print a line if the text is foreign to the model, differs from the earlier plan's, or changes no weight."""
        from quant.schemes import SCHEMES

        if calibration.foreign:
            tell(
                f"warning: on {self.calib} the model's perplexity is {calibration.perplexity:.0f}, worse than guessing "
                f"among its {calibration.vocab_size} tokens: give text of the kind that it was trained on"
            )
        if self.planned:
            return
        schemes = [SCHEMES[name] for name in (self.scheme, *(rule.scheme for rule in found.rules)) if name in SCHEMES]
        if self.smoothing(found.earlier)[0] is None and not any(scheme.calibrated for scheme in schemes):
            tell(
                "note: the calibration text changes no weight here, it only measures the damage of each tensor for the "
                "report; schemes that use it end in -gptq"
            )
        if found.earlier and (told := found.earlier.other_text(calibration)):
            tell(f"warning: {told}")
