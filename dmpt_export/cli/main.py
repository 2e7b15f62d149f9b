"""The `dmpt-export` command: a group that loads its verbs on use, and the exit codes."""

from __future__ import annotations

import atexit
import difflib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from dmpt_export import __version__
from dmpt_export.cli import INTERRUPTED

# In the order of the work; each is dmpt_export/cli/<verb>.py. The help lists them in this order.
VERBS = (
    "init",
    "train",
    "quantize",
    "onnx",
    "check",
    "run",
    "serve",
    "eval",
    "bench",
    "compare",
    "card",
    "page",
    "inspect",
    "demo",
    "convert",
)

OK, BUG, USAGE, BAD_INPUT, NO_RESOURCES, BROKEN_PIPE = 0, 1, 2, 3, 5, 141

# System errors when a path given by the user cannot be used, and when a resource runs out.
PATH_ERRORS = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
}  # fmt: skip
RESOURCE_ERRORS = {errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's tofile on a full disk


class LazyGroup(click.Group):
    """A group that imports a verb's module only when the verb is named, or listed in the help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"dmpt_export.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and (near := difflib.get_close_matches(args[0], VERBS, 1)):
            ctx.fail(f"No such command '{args[0]}': did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Report errors that name fields of a verb's request with the verb's flags."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            verb = ctx.invoked_subcommand
            command = None if verb is None else self.get_command(ctx, verb)
            if command is None or not hasattr(error, "with_flags"):  # `run` must not need the training packages
                raise
            from training.cli.flags import as_click_error
            from training.errors import FieldError

            if not isinstance(error, FieldError):
                raise
            raise as_click_error(error, click.Context(command, ctx, verb)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Train, quantize, export and run multi-path GPT-2 models.

    A Dynamic Multiple Path Transformer (DMPT) is a GPT-2 whose upper blocks split into paths; a small gate
    routes each token to one of them, and every path mixes several vocabulary heads. Plain GPT-2 uses the
    same commands.

    \b
    Try all steps in a few minutes, without network:
      dmpt-export demo
    Or step by step, from a GPT-2 folder or hub id:
      dmpt-export init gpt2 dmpt --splits 6 --heads 8 --fast-k 256
      dmpt-export train dmpt tuned --recipe deployed --data text.txt
      dmpt-export quantize tuned small --scheme int8
      dmpt-export onnx small device
      dmpt-export run device "Once upon a time"

    Exit codes: 0 done, 2 wrong usage, 3 bad input, 4 a result failed its check, 5 out of memory or disk,
    or a port in use, 130 interrupted.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. A bug (an error not meant for users) keeps its traceback."""
    open_standard_streams()
    from runtime.ort import no_telemetry

    no_telemetry()
    given = list(sys.argv[1:] if args is None else args)
    try:
        with cli.make_context("dmpt-export", [spooled(arg) for arg in given]) as context:
            cli.invoke(context)
        if sys.stdout is not None:  # `>&-` closes it
            sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        error.show()
        if given[:1] == ["run"] and any(is_like_a_prompt(arg) for arg in given):
            click.echo("Put a prompt that begins with - after --: dmpt-export run MODEL -- '- item'", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe. Flushing at exit must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        code, message = told
        click.echo(f"Error: {' '.join(message.split())}", err=True)
        return code
    return OK


def is_like_a_prompt(argument: str) -> bool:
    """Whether an argument begins with - but is text or not a valid option name."""
    return argument.startswith("-") and (" " in argument or not re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", argument))


def open_standard_streams() -> None:
    """Open the null device for each standard stream that the caller closed (`2>&-`). Otherwise the next opened file
    would become, say, standard error, and libraries would write warnings into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the program runs)


def spooled(argument: str) -> str:
    """Copy a shell pipe (`--data <(zcat ...)`) to a file, because texts are read more than once; any other argument
    stays unchanged."""
    name, equals, path = argument.rpartition("=")
    if not re.fullmatch(r"/dev/fd/\d+|/proc/self/fd/\d+", path) or not stat.S_ISFIFO(os.stat(path).st_mode):
        return argument
    folder = tempfile.mkdtemp(prefix="dmpt-export-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = os.path.join(folder, f"pipe-{os.path.basename(path)}")
    with open(path, "rb") as pipe, open(copy, "wb") as out:
        shutil.copyfileobj(pipe, out)
    return f"{name}{equals}{copy}"


def explain(error: Exception) -> tuple[int, str] | None:
    """(exit code, message) of an error meant for users, or None for a bug."""
    code = getattr(error, "exit_code", None)
    if isinstance(error, click.ClickException):
        return BAD_INPUT, error.format_message()
    if type(code) is int:
        return code, str(error)
    if isinstance(error, OSError) and error.errno in RESOURCE_ERRORS:
        return NO_RESOURCES, f"{error.strerror}{path_of(error)}: free some, or choose another place"
    if isinstance(error, OSError) and error.errno is None and SHORT_WRITE.fullmatch(str(error)):
        return NO_RESOURCES, f"no space left where the result goes ({error}): free some, or choose another place"
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
        return BAD_INPUT, f"{error.strerror}{path_of(error)}"
    from runtime.errors import is_out_of_memory

    if is_out_of_memory(error):
        return NO_RESOURCES, f"out of memory: use a shorter context, a smaller batch or a smaller model ({error})"
    return None


def path_of(error: OSError) -> str:
    return "" if error.filename is None else f": {os.fsdecode(error.filename)!r}"
