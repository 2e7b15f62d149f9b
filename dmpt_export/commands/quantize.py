"""`dmpt-export quantize`: float checkpoint -> quantized checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.extras import require

if TYPE_CHECKING:
    from quant.quantize import TensorReport


class SchemeName(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A choice among the registered schemes, which are imported only when they are needed."""

    name = "scheme"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        from quant.schemes import SCHEMES

        return f"[{'|'.join(SCHEMES)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from quant.schemes import SCHEMES

        if value not in SCHEMES:
            self.fail(f"'{value}' is not one of {', '.join(SCHEMES)}.", param, ctx)
        return str(value)


@click.command("quantize", short_help="Store a checkpoint's weights in fewer bits.")
@click.argument("checkpoint")
@click.argument("out", type=click.Path())
@click.option("--scheme", type=SchemeName(), required=True, help="How to store weights; see above.")
@click.option("--block", type=click.Choice(["16", "32", "64", "128", "256"]), help="Weights that share a scale: "
              "fewer are closer to the original, and larger. Default: 128 for int8, 32 for int4.")  # fmt: skip
@click.option("--rule", "rules", metavar="PATTERN=SCHEME[:BLOCK]", multiple=True,
              help="Another scheme, or float32, for the tensors whose name matches; repeat for more, the first "
                   "that matches wins.")  # fmt: skip
def command(checkpoint: str, out: str, scheme: str, block: str | None, rules: tuple[str, ...]) -> None:
    """Quantize the weights of CHECKPOINT into the folder OUT and say what it cost.

    CHECKPOINT is a DMPT folder, or a GPT-2 folder or hub id. All linear layers of the blocks, the token
    embedding and the vocabulary heads are quantized; norms, biases, positions and gates stay float32.

    \b
    int8          8 bits per weight, a scale per block; close to lossless
    int4          4 bits per weight, a scale per block; the smallest and fastest to decode
    int8-dynamic  8 bits, a scale per output; activations are rounded too (CPU only): the fastest to read
                  long prompts, but check the quality with `dmpt-export eval`

    \b
    In rules for heads also:
    delta-rN      as its path's first head (the anchor) plus a delta of rank N (16, 32, 64, 128, 256); the heads of
                  a path share the larger factor, so a row of 4-bit codes serves all of them

    \b
    Example:
      dmpt-export quantize tuned small --scheme int4 --rule 'transformer.wte=int8:64'
      dmpt-export quantize tuned small --scheme int4 --rule 'heads.*=delta-r64'
      dmpt-export onnx small device

    The table gives, for each way of storing, the size and the tensor that lost most (relative error: the norm
    of the difference over the norm of the weights).
    """
    require("train")
    from quant.checkpoint import save_quantized
    from quant.rules import parse_rule

    parsed = [parse_rule(rule) for rule in rules]
    reports = save_quantized(checkpoint, out, scheme, int(block) if block else None, parsed)
    click.echo(table(reports))
    click.echo(f"wrote {out}; next: dmpt-export onnx {out} DEVICE_FOLDER", err=True)


def table(reports: Sequence[TensorReport]) -> str:
    """One line for each way of storing, the most weights first, and the total."""
    groups: dict[str, list[TensorReport]] = {}
    for report in reports:
        groups.setdefault(report.scheme + (f" block {report.block}" if report.block else ""), []).append(report)
    ordered = sorted(groups.items(), key=lambda item: -sum(report.weights for report in item[1]))
    lines = [("stored as", "tensors", "weights", "bits/weight", "MB before", "MB after", "worst relative error")]
    for label, group in [*ordered, ("total", list(reports))]:
        worst = max(group, key=lambda report: report.relative_error)
        told = label != "total" and worst.relative_error > 0
        of_delta = "" if worst.delta_error is None else f", {worst.delta_error:.4f} of its delta"
        lines.append((*_sums(label, group), f"{worst.relative_error:.4f} {worst.name}{of_delta}" if told else ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(_row(line, widths) for line in lines)


def _sums(label: str, group: Sequence[TensorReport]) -> tuple[str, str, str, str, str, str]:
    weights, before, after = (sum(getattr(r, f) for r in group) for f in ("weights", "bytes_before", "bytes_after"))
    sizes = (f"{weights:,}", f"{8 * after / weights:.2f}", f"{before / 1e6:.2f}", f"{after / 1e6:.2f}")
    return (label, str(len(group)), *sizes)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first and the last column to the left, numbers to the right."""
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *numbers, cells[-1]]).rstrip()
