"""Continue a prompt with an exported model. This module works without the training packages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmpt_export.extras import require
from dmpt_export.requests.sources import usage_of_runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtime.generate import Generation, Generations
    from runtime.model import Model
    from runtime.sampling import Sampling, SamplingOptions
    from runtime.sequence import Sequence
    from runtime.writing import Limits


@dataclass(frozen=True)
class Loaded:
    """A loaded model."""

    model: Model
    seconds: float  # that loading took
    after: Sequence | None  # the saved prompt to continue


@dataclass(frozen=True)
class RunRequest:
    model: str  # ONNX folder
    prompt: str | None = None  # None: it comes from elsewhere
    max_new_tokens: int = 128  # tokens
    temperature: float | None = None  # 0: the likeliest token; None: 1 with top_k, top_p, min_p or seed, else 0
    top_k: int | None = None  # tokens to sample among
    top_p: float | None = None  # probability of the tokens to sample among
    min_p: float | None = None  # least probability of those, over the likeliest token's
    repetition_penalty: float = 1.0  # above 1: tokens that occurred already become less likely
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, and what is added to their log-probs
    seed: int | None = None  # None: another one each time
    stop: tuple[str, ...] = ()  # texts that end the output
    on_full: str = "stop"  # stop or slide
    truncate: str | None = None  # where a prompt that does not fit is cut: left, middle or right
    speculate: int = 0  # tokens to guess at most
    logprobs: int | None = None  # likeliest tokens to report with each token; 0: its own log-prob; None: neither
    after: str | None = None  # file of a saved prompt that the prompt continues
    save_prompt: str | None = None  # file for the prompt's caches; no text is written
    batch: bool = False  # the prompt has one prompt a line
    threads: int | None = None  # of the CPU; None: what this process may use
    deterministic: bool = False  # one thread and reproducible arithmetic
    device: str = "cpu"  # cpu or cuda
    no_check: bool = False  # the files' sha256 are not compared with the manifest

    def check(self) -> None:
        """Raise OptionError for a value that no model could take, before one is loaded."""
        if self.batch and self.prompt is not None:
            from training.errors import OptionError

            raise OptionError("{batch} reads its prompts from standard input, one a line: leave {prompt} out")
        if self.save_prompt is not None and (self.batch or self.logprobs is not None):
            from training.errors import OptionError

            raise OptionError("{save_prompt} reads one prompt and writes no text: leave {batch} and {logprobs} out")
        require(self.device)
        from runtime.threads import resolve_threads
        from runtime.truncation import check_side

        with usage_of_runtime():
            self.sampling()
            self.limits()
            check_side(self.truncate)
            resolve_threads(self.threads, self.deterministic)
        self.check_files()

    def check_files(self) -> None:
        """Raise RequestError for a saved prompt that is not there, or a place where none can be written."""
        from runtime.saved_prompt import check_place, check_saved

        if self.after is not None:
            check_saved(self.after)
        if self.save_prompt is not None:
            check_place(self.save_prompt)

    @contextmanager
    def run(self) -> Iterator[Loaded]:
        """Load the model, for as long as the block lasts."""
        import runtime

        started = time.perf_counter()
        with runtime.load(
            self.model, self.device, self.threads, verify=not self.no_check, deterministic=self.deterministic
        ) as model:
            after = None if self.after is None else runtime.load_prompt(model, self.after)
            yield Loaded(model, time.perf_counter() - started, after)

    def sampling(self) -> Sampling:
        from runtime.sampling import Sampling

        return Sampling(**self.choosing())

    def choosing(self) -> SamplingOptions:
        """How tokens are chosen, as arguments of runtime.Model.stream."""
        return {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "logit_bias": dict(self.logit_bias), "seed": self.seed,
        }  # fmt: skip

    def limits(self) -> Limits:
        from runtime.writing import Limits

        return Limits(self.max_new_tokens, self.stop, self.on_full, self.speculate, self.logprobs)

    def stream(self, loaded: Loaded, text: str) -> Generation:
        """Iterate over the generated tokens that continue a text."""
        made = loaded.model.stream(
            text, self.max_new_tokens, stop=self.stop, on_full=self.on_full, speculate=self.speculate,
            truncate=self.truncate, logprobs=self.logprobs, after=loaded.after, **self.choosing(),
        )  # fmt: skip
        from runtime.generate import Generation

        assert isinstance(made, Generation)
        return made

    def stream_lines(self, loaded: Loaded, text: str) -> tuple[Generations, dict[int, str]]:
        """What continues each line of a text, and by line, from 0, why it cannot be continued."""
        from runtime.errors import RequestError
        from runtime.generate import Generations

        sampling, limits = self.sampling(), self.limits()
        ids: list[NDArray[np.int64] | None] = []
        wrong = {}
        for row, line in enumerate(text.split("\n")):
            try:
                ids.append(loaded.model.prompt_for(line.removesuffix("\r"), limits, self.truncate, loaded.after))
            except RequestError as error:
                ids.append(None)
                wrong[row] = str(error)
        return Generations(loaded.model, ids, sampling, limits, loaded.after), wrong

    def save(self, loaded: Loaded, text: str) -> int:
        """Read a text, after a saved prompt if there is one, and save its caches: the number of tokens.

        Every path reads it, so that none has to catch up on it later, each time the prompt is continued.
        """
        assert self.save_prompt is not None
        ids = loaded.model.prompt_for(text, self.limits(), self.truncate, loaded.after)
        sequence = loaded.model.sequence(len(ids)) if loaded.after is None else loaded.after
        if len(ids) > sequence.length:
            sequence.feed(ids[sequence.length :], every_path=True)
        sequence.save(self.save_prompt)
        return len(ids)
