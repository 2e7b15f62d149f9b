"""`optimum-cli dmpt VERB ...` and `optimum-cli export dmpt CHECKPOINT OUT ...`.

optimum 2 imports every file of the namespace package `optimum.commands.register`, where installing this project puts
this one. Options are passed on unchanged: argparse leaves them alone, because no argument begins with its prefix.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class DmptCommand(BaseOptimumCLICommand):
    """dmpt-export, under optimum-cli."""

    COMMAND = CommandInfo(
        name="dmpt", help="Train, quantize, export, run and compare GPT-2s and DMPTs: the verbs of dmpt-export."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # also --help goes to dmpt-export
        parser.add_argument("arguments", nargs=REMAINDER)

    def command_line(self) -> list[str]:
        return list(self.args.arguments)

    def run(self) -> None:
        from dmpt_export.cli.main import main

        sys.exit(main(self.command_line()))


class DmptExportCommand(DmptCommand):
    """`dmpt-export onnx`, in the layout that optimum opens."""

    COMMAND = CommandInfo(
        name="dmpt", help="Export a GPT-2 or DMPT with dmpt-export, for ORTModelForCausalLM (--layout standard)."
    )

    def command_line(self) -> list[str]:
        return ["onnx", "--layout", "standard", *self.args.arguments]  # the last of two --layout counts


REGISTER_COMMANDS = [DmptCommand, (DmptExportCommand, ExportCommand)]
