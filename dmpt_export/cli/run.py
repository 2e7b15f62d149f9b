"""`dmpt-export run`: continue a prompt with an exported model, streaming to stdout."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from dmpt_export.cli.conversation import converse
from dmpt_export.requests.run import RunRequest

if TYPE_CHECKING:
    from runtime.generate import Generation, Generations
    from runtime.writing import Writing

MOST_NAMED = 10  # unusable prompts in one message
MOST_INPUT = 64 << 20  # bytes read from standard input; the model checks whether the text fits the context


class Bias(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A token id and what is added to its log-probability."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = value.partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"'{value}' is not of the form ID=BIAS, such as 50256=-100.", param, ctx)


@click.command("run", short_help="Continue a prompt with an exported model, without torch.")
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True,
              help="Maximum number of new tokens; end of text or a full context stops earlier.")  # fmt: skip
@click.option("-t", "--temperature", type=float, help="0 always takes the likeliest token, 1 samples from the "
              "model's distribution. Default: 1 with --top-k, --top-p, --min-p or --seed, else 0.")  # fmt: skip
@click.option("--top-k", type=int, help="Sample among the K likeliest tokens only.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens that together have probability P.")
@click.option("--min-p", type=float, help="Sample among tokens at least P times as likely as the likeliest.")
@click.option("--logit-bias", type=Bias(), metavar="ID=BIAS", multiple=True, help="Add BIAS to the log-probability "
              "of token ID; -100 as good as forbids it. May be repeated.")  # fmt: skip
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True,
              help="Above 1: makes tokens less likely that have already occurred.")  # fmt: skip
@click.option("--seed", type=int, help="The same seed gives the same text. Default: random.")
@click.option("--stop", multiple=True, help="Text that stops generation and is cut off; may be repeated.")
@click.option("--on-full", type=click.Choice(["stop", "slide"]), default="stop", show_default=True,
              help="When the context is full: stop, or continue from its last half.")  # fmt: skip
@click.option("--truncate", type=click.Choice(["left", "middle", "right"]), help="Where to cut a prompt that does "
              "not fit the context: left keeps its end. Default: refuse it; with --on-full slide: left.")  # fmt: skip
@click.option("--speculate", type=int, default=0, metavar="N", show_default=True, help="Guess up to N tokens and "
              "check them in one run: by draft heads where the model has them, else from the text so far.")  # fmt: skip
@click.option("--logprobs", type=click.IntRange(min=0), metavar="N", help="With --json or --batch: give each token's "
              "log-probability and those of the N likeliest tokens, before temperature, penalty and bias.")  # fmt: skip
@click.option("--save-prompt", metavar="FILE", help="Read the prompt, save it to FILE for --after, and write no text. "
              "FILE fits this export alone.")  # fmt: skip
@click.option("--after", metavar="FILE", help="Continue a prompt that --save-prompt saved, without reading it again; "
              "PROMPT follows it.")  # fmt: skip
@click.option("--batch", is_flag=True, help="Read one prompt per line from standard input, continue them "
              "together, and print one line of JSON for each, in order.")  # fmt: skip
@click.option("--threads", type=int, help="CPU threads. Default: all available to this process.")
@click.option("--deterministic", is_flag=True, help="One thread and reproducible arithmetic: equal seeds give equal "
              "text on every machine of a kind, with any number of CPUs.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--no-check", is_flag=True, help="Do not compare the files' sha256 with the manifest.")
@click.option("--echo", is_flag=True, help="Print the prompt before the text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the text and statistics instead.")
@click.option("-v", "--verbose", is_flag=True, help="Print speed and path usage on stderr, even if stderr is not a "
              "terminal.")  # fmt: skip
def command(as_json: bool, verbose: bool, echo: bool, **fields: Any) -> None:
    """Continue PROMPT (default: standard input) with the exported folder MODEL.

    The new text is streamed to stdout, everything else goes to stderr. Needs neither torch nor Transformers:
    the extra [cpu] is enough.

    \b
    Examples:
      dmpt-export run device "Once upon a time"
      dmpt-export run device "The tide mill" --temperature 0.8 --top-k 40 --seed 1
      echo "The tide mill" | dmpt-export run device --json
      dmpt-export run device --batch < prompts.txt
      dmpt-export run device --save-prompt rules.prompt < rules.txt
      dmpt-export run device --after rules.prompt "Question: "

    Next: `dmpt-export eval MODEL --data FILE` for its perplexity, `dmpt-export bench MODEL` for its speed.
    """
    request = RunRequest(**fields)
    if request.batch and (as_json or verbose or echo):
        raise click.UsageError("--batch prints a line of JSON for each prompt: leave --json, --echo and -v out")
    if request.logprobs is not None and not (as_json or request.batch):
        raise click.UsageError("--logprobs prints with --json or --batch only: give one of them")
    if request.save_prompt is not None and (as_json or echo):
        raise click.UsageError("--save-prompt writes no text: leave --json and --echo out")
    request.check()
    once = request.batch or as_json or request.save_prompt is not None
    if request.prompt is None and not once and is_terminal(sys.stdin, sys.stdout):
        with request.run() as loaded:
            converse(loaded, request, lambda text: show(request.stream(loaded, text), Clock(0.0), False, echo and text))
        return
    text = read_prompt() if request.prompt is None else as_utf8(request.prompt)
    with request.run() as loaded:
        if request.save_prompt is not None:
            tokens = request.save(loaded, text)
            if verbose or sys.stderr.isatty():
                click.echo(f"{tokens} tokens saved to {request.save_prompt}", err=True)
            return
        if request.batch:
            show_batch(*request.stream_lines(loaded, text))
            return
        clock = Clock(loaded.seconds)
        generation = request.stream(loaded, text)
        try:
            show(generation, clock, as_json, echo and text)
        finally:
            if not as_json:
                click.echo()
        statistics = {**clock.statistics(generation), "threads": loaded.model.threads, "device": request.device}
    if as_json:
        click.echo(json.dumps({**result(generation), **statistics}))
    elif verbose or sys.stderr.isatty():
        click.echo(summary(statistics), err=True)


def result(text: Writing) -> dict[str, Any]:
    """What JSON says of a complete text."""
    found: dict[str, Any] = {"text": text.text, "ids": text.ids}
    if text.limits.logprobs is not None and text.model.codec is not None:
        codec = text.model.codec

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            finite = logprob is not None and math.isfinite(logprob)  # JSON has no infinity
            return {"id": token, "text": codec.decode([token]), "logprob": logprob if finite else None}

        found["logprobs"] = [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top_logprobs]}
            for token in text.tokens
        ]
    return found


def is_terminal(*streams: Any) -> bool:
    return all(stream is not None and stream.isatty() for stream in streams)


def as_utf8(argument: str) -> str:
    """An argument's bytes decoded as UTF-8 in any locale. Invalid bytes are refused when the prompt is tokenised."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def read_prompt() -> str:
    """All of standard input, without the final line break."""
    from runtime.errors import RequestError

    if sys.stdin is None:
        raise RequestError("there is no prompt: give it as an argument or on standard input")
    if sys.stdin.isatty():
        click.echo("Reading the prompt from the terminal; Ctrl-D ends it.", err=True)
    data = sys.stdin.buffer.read(MOST_INPUT + 1)
    if len(data) > MOST_INPUT:
        raise RequestError(f"the prompt on standard input is larger than {MOST_INPUT >> 20} MB: give less")
    if not data.strip():
        raise RequestError("the prompt is empty: give some text (after -- if it begins with -)")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on standard input is not UTF-8 (byte {error.start})") from error


class Clock:
    """Times of one generation, and the path of each token."""

    def __init__(self, load_s: float) -> None:
        self.load_s = load_s
        self.started = self.first = self.latest = time.perf_counter()
        self.paths: Counter[str] = Counter()

    def tick(self, path: str) -> None:
        self.latest = time.perf_counter()
        if not self.paths:
            self.first = self.latest
        self.paths[path] += 1

    def statistics(self, generation: Generation) -> dict[str, Any]:
        """The first token ends the prefill; decoding speed is measured over the others."""
        prefill, decode, new = self.first - self.started, self.latest - self.first, len(generation.ids)
        read = len(generation.prompt) - generation.known
        return {
            "prompt_tokens": len(generation.prompt),
            "new_tokens": new,
            "stop_reason": generation.stop_reason,
            "load_s": round(self.load_s, 4),
            **({"saved_tokens": generation.known} if generation.after is not None else {}),
            "prefill_tokens_per_s": round(read / prefill, 2) if prefill > 0 else None,
            "decode_tokens_per_s": round((new - 1) / decode, 2) if decode > 0 else None,
            **(guesses(generation) if generation.limits.speculate else {}),
            "path_shares": {path: round(count / new, 4) for path, count in sorted(self.paths.items())},
        }


def guesses(generation: Generation) -> dict[str, Any]:
    """How often guesses of --speculate were right."""
    runs = generation.runs
    return {
        "runs": runs,
        "drafted": generation.drafted,
        "accepted": generation.accepted,
        "tokens_per_run": round(len(generation.ids) / runs, 3) if runs else None,
    }


def show(generation: Generation, clock: Clock, quiet: bool, echo: str | bool = False) -> None:
    """Generate the text; unless quiet, print each piece at once, after `echo`. A terminal that lacks a character shows
    "?"."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if echo and not quiet:
        click.echo(echo, nl=False)
    for token in generation:
        clock.tick(token.path)
        if token.text and not quiet:
            click.echo(token.text, nl=False)


def show_batch(generations: Generations, wrong: dict[int, str]) -> None:
    """Generate the texts together; print a line for each prompt as soon as it and those before it are complete.

    wrong: by row, why a prompt cannot be continued; the exit code is then 3.
    """
    unprinted: dict[int, Any] = dict(sorted({**wrong, **{text.row: text for text in generations.texts}}.items()))

    def flush() -> None:
        for row, text in list(unprinted.items()):
            if isinstance(text, str):
                click.echo(json.dumps({"error": text}))
            elif text.stop_reason is None:
                return
            else:
                click.echo(json.dumps({**result(text), "stop_reason": text.stop_reason}))
            del unprinted[row]

    for _ in generations:
        flush()
    flush()
    if wrong:
        rows = [str(row + 1) for row in sorted(wrong)]
        more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        click.echo(
            f"Error: {len(rows)} of {len(rows) + len(generations.texts)} prompts could not be continued: "
            f'see "error" in line{"s" * (len(rows) > 1)} {", ".join(rows[:MOST_NAMED])}{more} of the output',
            err=True,
        )
        click.get_current_context().exit(3)


def summary(statistics: dict[str, Any]) -> str:
    decode = statistics["decode_tokens_per_s"]
    speed = f", {decode:.1f} tokens/s" if decode else ""
    if "drafted" in statistics:
        speed += f", {statistics['accepted']} of {statistics['drafted']} guesses right, "
        speed += f"{statistics['tokens_per_run']:.2f} tokens per run"
    shares = ", ".join(f"{path} {share:.0%}" for path, share in statistics["path_shares"].items())
    return (
        f"{statistics['prompt_tokens']} + {statistics['new_tokens']} tokens{speed}, "
        f"prefill {statistics['prefill_tokens_per_s']:.1f} tokens/s, loaded in {statistics['load_s']:.2f} s, "
        f"{statistics['threads']} threads, stopped by {statistics['stop_reason']}; paths: {shares}"
    )
