"""An exported model: scoring and text generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.batch import Batch
from runtime.errors import RequestError
from runtime.files import check_data, check_files
from runtime.generate import Generation, Generations
from runtime.manifest import Manifest
from runtime.manifest_file import TOKENIZER_NAME, read_manifest
from runtime.proof import read_proof
from runtime.request import check_count, check_ids, is_empty, is_many
from runtime.sampling import Sampling, SamplingOptions
from runtime.self_check import SelfCheck, run_proof
from runtime.sequence import Sequence
from runtime.session import Engine
from runtime.text import TextCodec, utf8
from runtime.threads import resolve_threads
from runtime.truncation import LEFT, check_side, shortened, shortened_text
from runtime.writing import SLIDE, STOP, Limits, Writing

# Positions per run when scoring. Each one returns a vocabulary row and gathers its fast_k candidates' rows of all other
# heads: positions * fast_k * heads * n_embd values. For 64 positions of GPT-2 small with fast_k 256 and three other
# heads that is 151 MB of floats, or 38 MB of int8 codes. Smaller runs are slower: 27 positions (64 MB) by a fifth.
SCORED_AT_ONCE = 64
DEFAULT_NEW_TOKENS = 128
Scored = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32] | None]
MOST_BYTES_PER_TOKEN = 256  # GPT-2's longest token has 128 bytes: text with more per position cannot fit


class Model:
    """A model loaded by `runtime.load`. Several threads may use it at once: each text has its own caches.

    Attributes: manifest (`.raw` is the JSON), folder, device, threads, context (tokens), vocab_size,
    ends (ids that end a text), end_of_text (the usual one of them, or None), codec (None when the folder has no
    tokenizer).
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        *,
        verify: bool = True,
        deterministic: bool = False,
    ) -> None:
        """See `runtime.load`."""
        self.folder = Path(folder)
        self.device = device
        self.threads = resolve_threads(threads, deterministic)
        self.manifest: Manifest = read_manifest(self.folder)
        check_files(self.folder, self.manifest, verify)
        listed = {entry.name for entry in self.manifest.files}
        check_data(self.folder, [self.manifest.model], listed)
        self.codec = TextCodec(self.folder / TOKENIZER_NAME, self.manifest.prefix) if TOKENIZER_NAME in listed else None
        self.context: int = self.manifest.config.n_positions
        self.vocab_size: int = self.manifest.config.vocab_size
        self.ends = frozenset(self.manifest.ends)
        self.end_of_text: int | None = next(iter(self.manifest.ends), None)
        self.engine = Engine(self.folder, self.manifest, device, self.threads, deterministic)

    # --- text ---------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises RequestError without a tokenizer or for text that is not valid UTF-8."""
        return self._codec().encode(text)

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids, without special tokens. Raises RequestError without a tokenizer."""
        return self._codec().decode(check_ids(ids, self.vocab_size, np.size(ids)).tolist() if np.size(ids) else [])

    def _codec(self) -> TextCodec:
        if self.codec is None:
            raise RequestError(f"{self.folder} has no tokenizer: give token ids instead of text")
        return self.codec

    def prompt_ids(
        self,
        prompt: str | ArrayLike,
        truncate: str | None = None,
        room: int | None = None,
        after: Sequence | None = None,
    ) -> NDArray[np.int64]:
        """Ids of a prompt that fits the context. Text that is too long is rejected before it is tokenised.

        truncate: of a prompt that does not fit, drop tokens "left", "middle" or "right" until `room` are left (the
        whole context by default). after: what the prompt continues; its ids are put in front and never cut, and the
        prompt may then be empty.
        """
        check_side(truncate)
        before = np.empty(0, np.int64) if after is None else self.tokens_of(after)
        room = self.context if room is None else room
        if isinstance(prompt, str):
            if truncate is not None:
                prompt = shortened_text(prompt, self.context * MOST_BYTES_PER_TOKEN // 4, truncate)
            size, most = len(utf8(prompt)), self.context * MOST_BYTES_PER_TOKEN
            if size > most:
                raise RequestError(
                    f"the prompt has {size} bytes, a context of {self.context} tokens holds at most {most}: shorten "
                    "it, or choose where to cut it (truncate)"
                )
            if not prompt and after is None:
                raise RequestError("the prompt is empty: give some text")
            prompt = self._codec().encode(prompt, begins=after is None)
        if after is not None and is_empty(prompt):
            return before
        most = self.context if truncate is None else max(self.context, len(before) + np.size(prompt))
        ids = check_ids(prompt, self.vocab_size, most, len(before))
        if len(before) + len(ids) > self.context:
            ids = self._shortened(ids, room, str(truncate), len(before))
        return np.concatenate([before, ids]) if len(before) else ids

    def _shortened(self, ids: NDArray[np.int64], room: int, truncate: str, used: int) -> NDArray[np.int64]:
        """Ids cut to room - used; without `used` tokens before them, the prefix of the folder stays."""
        if used >= room:
            raise RequestError(
                f"a prompt cut to fit would get {room} tokens, and the text that it continues has {used}: shorten "
                "that text, or give a prompt that fits"
            )
        prefix = self.manifest.prefix
        kept = len(prefix) if not used and ids[: len(prefix)].tolist() == prefix else 0
        return np.asarray(shortened(ids.tolist(), room - used, truncate, kept), np.int64)

    def tokens_of(self, after: Sequence) -> NDArray[np.int64]:
        """Ids of a text to continue. Raises RequestError for one of another model, or without tokens."""
        if not isinstance(after, Sequence) or after.engine is not self.engine:
            raise RequestError("after must be a sequence of this model, such as runtime.load_prompt returns")
        if not after.length:
            raise RequestError("the sequence to continue (after) has no tokens: feed some to it, or leave it out")
        return after.tokens

    def prompt_for(
        self, prompt: str | ArrayLike, limits: Limits, truncate: str | None, after: Sequence | None = None
    ) -> NDArray[np.int64]:
        """prompt_ids() with room for what is to be generated; on_full "slide" implies truncate "left".

        A prompt that is cut keeps the context less max_new_tokens, at least half; to slide, half.
        """
        half, slides = max(1, self.context // 2), limits.on_full == SLIDE
        room = half if slides else max(self.context - limits.max_new_tokens, half)
        return self.prompt_ids(prompt, LEFT if slides and truncate is None else truncate, room, after)

    def many_ids(
        self, prompts: Many[str | ArrayLike], limits: Limits, truncate: str | None, after: Sequence | None = None
    ) -> list[NDArray[np.int64]]:
        """prompt_for() of each prompt. Errors name the prompt by its number, from 1."""
        ids = []
        for number, prompt in enumerate(prompts, start=1):
            try:
                ids.append(self.prompt_for(prompt, limits, truncate, after))
            except RequestError as error:
                raise RequestError(f"prompt {number} of {len(prompts)}: {error}") from error
        return ids

    # --- scoring ------------------------------------------------------------------------------

    def sequence(self, capacity: int = 0) -> Sequence:
        """A new, empty text to feed tokens to, with room for `capacity` tokens."""
        return Sequence(self.engine, capacity)

    def batch(self, rows: int, capacity: int = 0) -> Batch:
        """Several new, empty texts to decode together, each with room for `capacity` tokens."""
        return Batch(self.engine, rows, capacity)

    def score(self, ids: ArrayLike, last: int | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probs of the deployed model after each of the last `last` tokens (all by default).

        Returns log-probs of the next token, float32 [last, vocab], and leaf indices, int64 [last]. Row t of
        `score(ids)` predicts token t + 1. Runs in chunks of 64 positions. Raises RequestError.
        """
        tokens = check_ids(ids, self.vocab_size, self.context)
        last = check_count("last", len(tokens) if last is None else last, len(tokens))
        log_probs = np.empty((last, self.vocab_size), np.float32)
        runs = self._pieces(tokens, last, lambda row, n: log_probs[row : row + n])
        return log_probs, np.concatenate([run.routes.copy() for run in runs])

    def log_probs(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Log of the deployed distribution, float32 [len(ids), vocab]: row t predicts token t + 1."""
        return self.score(ids)[0]

    def routes(self, ids: ArrayLike) -> list[str]:
        """Name of the path (leaf) that each token takes."""
        return [self.manifest.leaves[leaf] for leaf in self.score(ids)[1]]

    def score_pieces(self, ids: ArrayLike, last: int | None = None) -> Iterator[Scored]:
        """score() in pieces of 64 positions, for callers that reduce rows instead of keeping them.

        Each is (log-probs, leaf indices, head weights or None: see Sequence.head_weights). The next piece overwrites
        the log-probs of this one. Raises RequestError before computing anything.
        """
        tokens = check_ids(ids, self.vocab_size, self.context)
        last = check_count("last", len(tokens) if last is None else last, len(tokens))
        room = np.empty((min(last, SCORED_AT_ONCE), self.vocab_size), np.float32)
        runs = self._pieces(tokens, last, lambda row, n: room[:n])
        return ((room[: len(run.routes)], run.routes.copy(), run.head_weights()) for run in runs)

    def _pieces(
        self, tokens: NDArray[np.int64], last: int, room: Callable[[int, int], NDArray[np.float32]]
    ) -> Iterator[Sequence]:
        """Score in chunks into room(first row, rows) [rows, vocab]; yields the sequence after each chunk."""
        sequence = self.sequence(len(tokens))
        skipped = len(tokens) - last  # the first chunk also runs the tokens before the first scored one
        for row in range(0, last, SCORED_AT_ONCE):
            until = min(row + SCORED_AT_ONCE, last)
            ids = tokens[sequence.length : skipped + until]
            sequence.run(ids, room(row, until - row), tidy=until == last)
            yield sequence

    # --- writing ------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Any,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        stop: str | Many[str] = (),
        on_full: str = STOP,
        speculate: int = 0,
        truncate: str | None = None,
        logprobs: int | None = None,
        after: Sequence | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | Generations:
        """Generate text while you iterate over the result, one `Token(id, text, path, row)` at a time.

        prompt: text or token ids, or a list of these to continue together (`Token.row` is the prompt's index).
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, logit_bias and seed, see
        `runtime.sampling.Sampling`; greedy unless one of the first four or seed is given; row i of a list uses the seed
        plus i. stop: one or several strings that end the text. on_full: "stop", or "slide" to continue from the last
        half of a full context, read again as a new beginning. speculate: guess up to this many tokens, by the model's
        draft heads or else from the text so far, and check them in one run. Each token is still chosen from the model's
        own distribution, with the same random numbers, so the text stays the same except where kernel rounding decides
        (1e-5 for float weights, a few hundredths for int8 and int4, which round activations). After the iteration, the
        result's `ids`, `text` and `stop_reason` ("end_of_text", "stop_string", "max_new_tokens" or "context_full") are
        complete; for a list, those of each of its `texts`. Raises RequestError before computing anything. truncate:
        where to cut a prompt that does not fit: "left" keeps its end, "right" its beginning, "middle" both; on_full
        "slide" implies "left". logprobs: give each Token its log-probability (`logprob`) and those of this many
        likeliest tokens (`top_logprobs`), in the model's deployed distribution, before penalty, bias and temperature.
        after: a text that was read already (`runtime.load_prompt`, or a `sequence()` that you fed), which the prompt
        continues, and may be empty; it stays unchanged, so several prompts can follow it.
        """
        how = Sampling(**sampling)
        limits = Limits(max_new_tokens, stop, on_full, speculate, logprobs)
        if is_many(prompt):
            return Generations(self, self.many_ids(prompt, limits, truncate, after), how, limits, after)
        return Generation(self, self.prompt_for(prompt, limits, truncate, after), how, limits, after=after)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        on_token: Callable[[int, str], object] | None = None,
        stop: str | Many[str] = (),
        on_full: str = STOP,
        speculate: int = 0,
        truncate: str | None = None,
        logprobs: int | None = None,
        after: Sequence | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> str | list[Any]:
        """Continue a prompt: returns the new text for a text, the list of new token ids for token ids.

        A list of prompts is continued together and gives a list of the results that each prompt gives alone. on_token:
        called as on_token(token_id, piece) for each new token of a single prompt as soon as it is chosen. The joined
        pieces are the new text; no piece splits a character. An end-of-text token, if chosen, is the last id and has
        no text. With logprobs the result of a prompt is its list of Tokens instead. For the other arguments, limits and
        errors see stream().
        """
        made = self.stream(
            prompt, max_new_tokens, stop=stop, on_full=on_full, speculate=speculate, truncate=truncate,
            logprobs=logprobs, after=after, **sampling,
        )  # fmt: skip
        if on_token is not None and isinstance(made, Generations):
            raise RequestError("on_token is for one prompt: use stream() for several")
        for token in made:
            if on_token is not None:
                on_token(token.id, token.text)
        if isinstance(made, Generations):
            return [result(text, asked) for asked, text in zip(prompt, made.texts, strict=True)]
        return result(made, prompt)

    def self_check(self) -> SelfCheck:
        """Run the proof in the folder: does this device compute what the export must give? See `SelfCheck.failure`.

        Raises ModelError for a folder without a proof.
        """
        return run_proof(self.engine, read_proof(self.folder, self.manifest), self.threads)

    # --- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the graph and its weights now. A `with` block does so at its end."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def result(text: Writing, prompt: Any) -> Any:
    """What generate() returns for one prompt."""
    if text.limits.logprobs is not None:
        return text.tokens
    return text.text if isinstance(prompt, str) else text.ids
