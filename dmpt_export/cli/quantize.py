"""`dmpt-export quantize`: float checkpoint -> quantized checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.cli.checks import Finite, no_verify, usage
from dmpt_export.cli.extras import require

if TYPE_CHECKING:
    from quant.calibration import Calibration
    from quant.planning.plan import Plan, Target
    from quant.planning.saved_plan import Replay
    from quant.quantize import TensorReport
    from quant.rules import Rule
    from training.model.shape import Shape

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class SchemeName(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A choice among the registered schemes, which are imported only when they are needed."""

    name = "scheme"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        from quant.schemes import SCHEMES

        return f"[{'|'.join(SCHEMES)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from quant.schemes import SCHEMES
        from quant.schemes.low_rank import DELTAS

        if value not in SCHEMES and value not in DELTAS:  # what deltas are for is told with the rules
            self.fail(f"'{value}' is not one of {', '.join(SCHEMES)}.", param, ctx)
        return str(value)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 200MB, 1.5GB, 190MiB, 200000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+\.?\d*)\s*([A-Za-z]*)", str(value).strip())
        if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
            self.fail(f"'{value}' is no size: give one like 200MB, 1.5GB or 190MiB.", param, ctx)
        return int(float(found[1]) * UNITS[found[2].upper()])


@click.command("quantize", short_help="Store a checkpoint's weights in fewer bits.")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(), required=False)
@click.option("--scheme", type=SchemeName(), help="How to store weights; see above.")
@click.option("--block", type=click.Choice(["16", "32", "64", "128", "256"]), help="Weights that share a scale: "
              "fewer are closer to the original, and larger. Default: 128 for int8, 64 for int2, nf4 and fp4, "
              "else 32.")  # fmt: skip
@click.option("--asymmetric", is_flag=True, help="Store a zero point per block, too: closer, and a little larger.")
@click.option("--rule", "--layer-bits", "rules", metavar="PATTERN=SCHEME[:BLOCK][:asymmetric]", multiple=True,
              help="Another scheme, or float32, for the tensors whose name matches; repeat for more, the first "
                   "that matches wins. A number of bits stands for a scheme, with --calib for GPTQ's.")  # fmt: skip
@click.option("--calib", metavar="FILE", type=click.Path(), help="Calibration text, like what the model will read: for "
              "the gptq schemes, --smooth, plans, and the damage of each tensor in the report.")  # fmt: skip
@click.option("--calib-tokens", type=click.IntRange(min=2), default=8192, show_default=True,
              help="How much of the calibration text to use.")  # fmt: skip
@click.option("--smooth", "alpha", type=Finite(0, 1), metavar="ALPHA", help="For int8-dynamic: balance "
              "activations (1) against weights (0) first; 0.5 is usual.")  # fmt: skip
@click.option(
    "--target-size",
    type=Size(),
    help="Plan: the least damage within this size, such as "
    "200MB, of the weights' file; graph and tokenizer come on top.",
)
@click.option("--target-kl", type=Finite(min=0, min_open=True), metavar="NATS",
              help="Plan: the smallest model whose KL to the float one on that text is at most this.")  # fmt: skip
@click.option("--target-bits", type=Finite(min=0, min_open=True), metavar="BITS",
              help="Plan: the least damage within so many bits per weight, all tensors counted.")  # fmt: skip
@click.option("--candidates", metavar="SCHEME,...", help="What a plan chooses from, for each group of tensors, such as "
              "int8,int4:32,int2-gptq; a number of bits stands for a scheme as in --rule.  [int8, and int4-gptq in "
              "blocks of 16 to 128]")  # fmt: skip
@click.option("--plan", "replay", metavar="PLAN.json", type=click.Path(), help="Use the rules of an earlier plan. "
              "Its gptq parts need --calib again, and give the same bytes on the same text alone.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be done, write no model; OUT may be left out.")
@click.option("--cache-dir", type=click.Path(path_type=Path),
              help="Where damages are remembered: a killed plan goes on, another target is quick.  "
              "[default: ~/.cache/dmpt-export]")  # fmt: skip
@no_verify
@click.option("--tensors", is_flag=True, help="Print a line for each tensor, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with everything.")
def command(checkpoint: str, out: str | None, **options: Any) -> None:
    """Quantize the weights of CHECKPOINT into the folder OUT and say what it cost.

    CHECKPOINT is a DMPT folder, or a GPT-2 folder or hub id. All linear layers of the blocks, the token
    embedding and the vocabulary heads are quantized; norms, biases, positions and gates stay float32.

    \b
    int8          8 bits per weight, a scale per block; close to lossless
    int4          4 bits per weight, a scale per block; small and fast to decode
    int4-hqq      4 bits and zero points, fitted to most weights rather than to outliers
    int4-gptq     4 bits, rounded for the least error on calibration text (--calib)
    int3, int3-gptq  3 bits stored in 4, for comparison: no smaller than int4
    int2, int2-gptq  2 bits; for single layers, see --layer-bits
    int8-dynamic  8 bits, a scale per output; activations are rounded too (CPU only): the fastest to read
                  long prompts, but check the quality with `dmpt-export eval`
    nf4, fp4      bitsandbytes' 4 bits in the blocks, int8 for embedding and heads
    bnb-int8      bitsandbytes' 8 bits, a scale per output
    fp16          half the disk; on a CPU the model runs, and needs memory, as in float32

    With --target-size, --target-kl or --target-bits each attention, MLP, embedding and head gets bits by
    the damage it was measured to take: KL to the float model on the calibration text.

    \b
    In rules for heads also:
    delta-rN      as its path's first head (the anchor) plus a delta of rank N (16, 32, 64, 128, 256); the heads of
                  a path share the larger factor, so a row of 4-bit codes serves all of them. heads.*=delta-rN skips
                  the anchors, which keep their own scheme.

    \b
    Examples:
      dmpt-export quantize tuned small --scheme int4-gptq --calib train.txt --rule 'transformer.wte=int8:64'
      dmpt-export quantize tuned small --scheme int4 --rule 'heads.*=delta-r64'
      dmpt-export quantize tuned small --target-size 200MB --calib train.txt
      dmpt-export onnx small device

    OUT gets quantization_report.json and .svg: bits, error and damage of every tensor; a plan also plan.json.
    """
    planned = sum(options[name] is not None for name in ("target_size", "target_kl", "target_bits"))
    check_usage(out, planned, options)
    require("train")
    from training.progress import say

    rules, earlier = check_files(checkpoint, out, planned, options)
    say("loading PyTorch")
    calibration = read_calibration(checkpoint, options["calib"], options["calib_tokens"])
    if planned:
        _planned(checkpoint, out, calibration, options)
    else:
        if calibration:
            tell_of_text(calibration, earlier, rules, options)
        _by_rules(checkpoint, out, calibration, rules, options)
    if out and not options["dry_run"]:
        click.echo(f"wrote {out}; next: dmpt-export onnx {out} DEVICE_FOLDER", err=True)


def check_usage(out: str | None, planned: int, options: dict[str, Any]) -> None:
    """Raise UsageError for options that do not go together."""
    if out is None and not options["dry_run"]:
        raise click.UsageError("Missing argument 'OUT': the folder to write.")
    if planned > 1:
        raise click.UsageError("give one of --target-size, --target-kl and --target-bits")
    names = ("scheme", "block", "asymmetric", "rules", "alpha", "replay")
    others = [name for name in names if options[name] not in (None, False, ())]  # a balance of 0 is a choice, too
    if planned and others:
        told = {"rules": "--rule", "alpha": "--smooth", "replay": "--plan"}
        raise click.UsageError(
            f"a plan chooses by itself: leave out {told.get(others[0], f'--{others[0]}')}, or name what it may choose "
            "from with --candidates"
        )
    if planned and not options["calib"]:
        raise click.UsageError("a plan measures damage on calibration text: give some with --calib FILE")
    candidates = options["candidates"]
    if not planned and candidates is not None:
        raise click.UsageError("--candidates are for a plan: give --target-size, --target-kl or --target-bits")
    if candidates is not None and not all(part.strip() for part in candidates.split(",")):
        raise click.UsageError(f"--candidates '{candidates}' has an empty part: give schemes with a comma between them")
    if not planned and not options["scheme"] and not options["replay"]:
        raise click.UsageError("give --scheme, or a target for a plan such as --target-size 200MB, or --plan PLAN.json")
    with usage():
        check_schemes(options)


def check_schemes(options: dict[str, Any]) -> None:
    """Raise InputError for schemes, blocks or rules that no model can have."""
    from quant.planning.plan import check_candidates
    from quant.rules import default_rules, parse_rule

    if options["scheme"]:
        default_rules(options["scheme"], block_of(options), options["asymmetric"])
    for rule in options["rules"]:
        parse_rule(rule)
    if options["candidates"]:
        check_candidates(options["candidates"])


def check_files(
    checkpoint: str, out: str | None, planned: int, options: dict[str, Any]
) -> tuple[list[Rule], Replay | None]:
    """Refuse, before torch is imported, what files cannot give: the model, OUT, the texts, rules that do not fit.

    Returns the rules, those of --rule and then those of --plan, and what --plan says.
    """
    from quant.planning.plan import CANDIDATES, check_target
    from quant.planning.saved_plan import read_plan
    from quant.rules import anchors_of, parse_rule
    from quant.schemes import check_installed
    from quant.text import read_ids
    from training.checkpoints.atomic import check_inputs, check_place, check_replaceable
    from training.checkpoints.folder import float_folder, read_shape, tensor_shapes

    calibrated = options["calib"] is not None
    earlier = read_plan(options["replay"]) if options["replay"] else None
    rules = [*(parse_rule(rule, calibrated) for rule in options["rules"]), *(earlier.rules if earlier else [])]
    if earlier and not calibrated:
        earlier.check_text()
    candidates = options["candidates"] or CANDIDATES
    chosen = [part.strip().partition(":")[0] for part in candidates.split(",")] if planned else []
    check_installed([options["scheme"], *chosen, *(rule.scheme for rule in rules)])
    if out is not None:
        check_replaceable(Path(out), "quantized")
        check_inputs(Path(out), checkpoint, options["calib"], options["replay"], options["cache_dir"])
    if planned:
        check_place(_cache(options))
    folder = float_folder(checkpoint)
    shape = read_shape(folder)
    shape.check_exportable()
    shapes = tensor_shapes(folder, shape)
    if shapes and planned:
        check_target(shapes, anchors_of(shape), candidates, _target(options))
    elif shapes:
        check_rules(shapes, shape, rules, options)
    if calibrated:  # last: the tokenizer of a foreign folder takes Transformers, and seconds
        read_ids(options["calib"], folder, shape, options["calib_tokens"])
    return rules, earlier


def check_rules(shapes: dict[str, tuple[int, ...]], shape: Shape, rules: list[Rule], options: dict[str, Any]) -> None:
    """Raise InputError for rules that do not fit the tensors, UsageError where what they need was not given."""
    from quant.rules import anchors_of, assign, default_rules
    from quant.schemes import SCHEMES

    defaults = default_rules(options["scheme"], block_of(options), options["asymmetric"]) if options["scheme"] else []
    chosen = assign(shapes, rules, defaults, shape.tie_word_embeddings, anchors_of(shape))
    needing = [name for name, rule in chosen.items() if rule.scheme in SCHEMES and SCHEMES[rule.scheme].calibrated]
    if needing and not options["calib"]:
        scheme = chosen[needing[0]].scheme
        raise click.UsageError(f"{scheme} (of {needing[0]}) goes by calibration text: give some with --calib FILE")
    if options["alpha"] is not None and all(rule.scheme != "int8-dynamic" for rule in chosen.values()):
        raise click.UsageError("smoothing is for int8-dynamic, which no tensor gets: leave --smooth out")
    if options["alpha"] is not None and not options["calib"]:
        raise click.UsageError("smoothing goes by calibration text: give some with --calib FILE")


def block_of(options: dict[str, Any]) -> int | None:
    return int(options["block"]) if options["block"] else None


def read_calibration(checkpoint: str, text: str | None, tokens: int) -> Calibration | None:
    from quant import calibration
    from training.progress import say

    if text is None:
        return None
    say(f"reading {text}, and what the float model makes of it")
    read = calibration.read_calibration(text, checkpoint, tokens)
    if read.foreign:
        click.echo(
            f"warning: on {text} the model's perplexity is {read.perplexity:.0f}, worse than guessing among "
            f"its {read.vocab_size} tokens: give text of the kind that it was trained on",
            err=True,
        )
    return read


def tell_of_text(calibration: Calibration, earlier: Replay | None, rules: list[Rule], options: dict[str, Any]) -> None:
    """One line where the calibration text is another than the earlier plan's, or decides nothing."""
    from quant.schemes import SCHEMES

    schemes = [SCHEMES[name] for name in (options["scheme"], *(rule.scheme for rule in rules)) if name in SCHEMES]
    if options["alpha"] is None and not any(scheme.calibrated for scheme in schemes):
        click.echo(
            "note: --calib changes no weight here, it only measures what each tensor loses, for the report; schemes "
            "that go by it end in -gptq",
            err=True,
        )
    if earlier and (told := earlier.other_text(calibration)):
        click.echo(f"warning: {told}", err=True)


def _by_rules(
    checkpoint: str, out: str | None, calibration: Calibration | None, rules: list[Rule], options: dict[str, Any]
) -> None:
    from benchmarks.report.quantization import report_files
    from quant.checkpoint import save_quantized
    from training.progress import say

    say("quantizing" if calibration is None else "quantizing, then measuring what each tensor loses")
    reports = save_quantized(
        checkpoint, None if options["dry_run"] else out, options["scheme"], block_of(options), rules,
        asymmetric=options["asymmetric"],
        calibration=calibration, alpha=options["alpha"], files=lambda reports: report_files(reports, None),
    )  # fmt: skip
    tell(reports, None, options)


def _planned(checkpoint: str, out: str | None, calibration: Calibration | None, options: dict[str, Any]) -> None:
    from benchmarks.report.quantization import report_files
    from quant.planning.plan import CANDIDATES
    from quant.planning.planned import save_planned
    from training.progress import say

    assert calibration is not None
    say("measuring what each group loses, by each way to store it")
    plan, reports = save_planned(
        checkpoint, None if options["dry_run"] else out, _target(options), calibration,
        _cache(options), options["candidates"] or CANDIDATES, report_files,
    )  # fmt: skip
    tell(reports, plan, options)


def tell(reports: Sequence[TensorReport], plan: Plan | None, options: dict[str, Any]) -> None:
    from benchmarks.report.quantization import report_json, show

    click.echo(
        json.dumps(report_json(reports, plan)) if options["as_json"] else show(reports, plan, options["tensors"])
    )


def _cache(options: dict[str, Any]) -> Path:
    """The folder where a plan remembers damages."""
    from training.checkpoints.files import cache_folder

    chosen: Path | None = options["cache_dir"]
    return chosen.expanduser() if chosen else cache_folder()


def _target(options: dict[str, Any]) -> Target:
    from quant.planning.plan import Target

    return Target(options["target_size"], options["target_kl"], options["target_bits"])
