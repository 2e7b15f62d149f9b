"""`dmpt-export check`: does this device compute what an exported model must give?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.requests.check import Checked, CheckRequest

if TYPE_CHECKING:
    from runtime.self_check import Part


@click.command("check", short_help="Check that this device computes an exported model right.")
@click.argument("model")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads. Default: all available to this process.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def command(as_json: bool, **fields: Any) -> None:
    """Run the proof in the exported folder MODEL on this device: a few dozen token ids whose paths and log-probs
    torch computed when the model was exported. Finds wrong kernels of a processor or of a version of ONNX Runtime in
    seconds. Needs neither torch nor Transformers: the extra [cpu] is enough.

    The proof is run with the whole text at once, token by token, and with two texts together. Exit code 0: all
    differences are within the tolerance of the export's weights; 4: they are not; 3: the folder has no proof, because
    an earlier version exported it or `onnx --no-verify` did.

    \b
    Example:
      dmpt-export check device
    """
    request = CheckRequest(**fields)
    request.check()
    checked = request.run()
    click.echo(json.dumps(as_object(checked), allow_nan=False) if as_json else "\n".join(lines(checked)))
    checked.found.require()


def as_object(checked: Checked) -> dict[str, Any]:
    exported = checked.found.proof.exported
    return {**checked.found.to_json(), "scheme": checked.scheme, "routes": checked.routes, "exported": exported}


def lines(checked: Checked) -> list[str]:
    found = checked.found
    allowed = found.proof.tolerance
    paths = ", ".join(f"{leaf} {n}" for leaf, n in checked.routes.items())
    limit = "" if allowed.max_abs is None else f", log-probs {allowed.max_abs:g}"
    exported = (found.proof.exported or {}).get("parts", {})
    return [
        f"onnxruntime {found.onnxruntime}, {found.processor}: {' '.join(found.features) or 'features unknown'}; "
        f"threads {found.threads}",
        f"weights {checked.scheme}; positions by path: {paths}",
        f"allowed: mean KL {allowed.kl_mean:g}{limit}, same top token {allowed.top1:.0%}",
        "",
        f"{'':16}{'mean KL':>9} {'exported':>9} {'largest':>9} {'same top':>9} {'near-ties':>10}",
        *(line(part, exported.get(part.name) or {}) for part in found.parts),
        "",
        "PASS" if found.failure is None else "FAIL",
    ]


def line(part: Part, exported: dict[str, Any]) -> str:
    """One way of running the proof: what it differs here, and what it differed where the model was exported."""
    if part.skipped is not None:
        return f"{part.name:16}not run: {part.skipped}"
    shown = f"{part.name:16}{number(part.kl_mean)} {number(exported.get('kl_mean'))} {number(part.max_abs_diff)} "
    same = "-" if part.top1_agreement is None else f"{part.top1_agreement:.0%}"
    shown += f"{same:>9} {part.near_ties:>10}  "
    return shown + ("PASS" if part.failure is None else f"FAIL: {part.failure}")


def number(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2g}':>9}"
