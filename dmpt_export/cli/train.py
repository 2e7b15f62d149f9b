"""`dmpt-export train`: the options are those of training.cli.parameters, imported when the verb is used."""

from __future__ import annotations

from typing import Any

import click

from dmpt_export.extras import require


class TrainCommand(click.Command):
    """Accepts option names with underscores (as in the original project) or dashes; prints its help in sections."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            from training.cli.parameters import parameters

            self.params = parameters()
        return super().get_params(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from training.cli.parameters import ABOUT, COMMON, SECTIONS

        every = bool(ctx.meta.get("all options"))
        helps = {"help", "help_all", "_click_default_help"}  # the last as click 8.2 calls it
        sections: dict[str, list[tuple[str, str]]] = {}
        title, left_out = "", 0
        for parameter in self.get_params(ctx):
            title = "Other" if parameter.name in helps else SECTIONS.get(parameter.name or "", title)
            record = parameter.get_help_record(ctx)
            if record is None or not isinstance(parameter, click.Option):
                continue
            if every or parameter.name in COMMON | helps:
                sections.setdefault(title, []).append(record)
            else:
                left_out += 1
        for title, rows in sorted(sections.items(), key=lambda item: item[0] == "Other"):
            with formatter.section(title):
                if every and title in ABOUT:
                    formatter.write_text(ABOUT[title])
                formatter.write_dl(rows)
        if left_out:
            formatter.write_paragraph()
            formatter.write_text(f"--help-all shows {left_out} more options, with what they do.")
        from training.cli.recipes import described

        with formatter.section("Recipes"):
            formatter.write_dl(described())


@click.command(
    "train",
    cls=TrainCommand,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    short_help="Train a DMPT or a plain GPT-2 on text.",
)
@click.pass_context
def command(context: click.Context, /, **_fields: Any) -> None:
    """Train MODEL (a DMPT or GPT-2 folder, or a hub id) on text; the folder OUT gets the result and the run.

    Plain GPT-2 uses the same trainer, so a comparison at equal tokens is fair. Training mixes the paths of a
    DMPT by their gates (gate_soft); --eval-data is scored as deployed: every token takes one path.

    \b
    Examples:
      dmpt-export train dmpt tuned --recipe deployed --data train.txt --eval-data valid.txt --max-steps 2000
      dmpt-export train gpt2 gpt2-tuned --data train.txt --max-steps 2000      the fair control
      dmpt-export train --out tuned --resume                                   after Ctrl-C
      dmpt-export train gpt2 big --data train.txt.xz --recipe dual-multi-head
      dmpt-export train --from-scratch --tokenizer gpt2 --n-layer 6 --n-embd 384 --n-head 6 OUT --data train.txt

    \b
    OUT afterwards:
      config.json, ...    the model to use: the best on --eval-data, else the last; OUT is a CHECKPOINT
      best/  last/        both checkpoints; last/trainer_state is what --resume continues from
      metrics.jsonl       a line per --log-every steps, evaluation and warning

    Several processes or GPUs: accelerate launch -m training MODEL OUT --data FILE ...

    \b
    Next:
      dmpt-export onnx OUT device --scheme int8
    """
    require("train")
    from training.cli.command import run

    run(context)
