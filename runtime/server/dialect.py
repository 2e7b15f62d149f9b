"""OpenAI's completions: from the body of a request to texts to write.

Source: the `openai` package's types (CompletionCreateParams) and its API reference. What it names and this server
cannot do is refused by name, and so are fields that it does not name: a misspelt limit should not go unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.model import MOST_BYTES_PER_TOKEN, Model
from runtime.request import check_ids
from runtime.sampling import Sampling, is_number, is_whole
from runtime.server.errors import MISSING, Refused, invalid
from runtime.server.limits import Bounds
from runtime.text import utf8
from runtime.writing import Limits

DEFAULT_TOKENS = 16  # OpenAI's
MOST_LOGPROBS, MOST_STOPS, LONGEST_STOP, MOST_BIASES = 5, 4, 500, 1024
MANY_CHARACTERS = 16  # of a token; English has 4 on average
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
KNOWN = {
    "model", "prompt", "max_tokens", "n", "best_of", "stream", "stream_options", "logprobs", "echo", "stop",
    "logit_bias", "presence_penalty", "frequency_penalty", "suffix", "user", *SAMPLING,
}  # fmt: skip

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """A request whose fields are valid; its prompts are not tokenised yet."""

    prompts: list[str | list[int]]
    n: int  # texts for each prompt
    sampling: Sampling
    limits: Limits
    scores: bool  # log-probs of the prompt, too
    echo: bool  # the prompt is put in front of each text
    writes: bool  # False: max_tokens is 0, and only the prompt is answered
    stream: bool
    usage: bool  # the stream ends with the numbers of tokens


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises Refused."""
    try:
        value = json.loads(body.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # also numbers with too many digits, and bytes that are not UTF-8
        raise invalid(f"the body is not valid JSON in UTF-8 ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    return value


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_request(body: Mapping[str, Any], name: str, bounds: Bounds) -> Asked:
    """Raises Refused for anything that this server or no model can do. name: that of the served model."""
    given = {field: value for field, value in body.items() if value is not None}
    if unknown := [field for field in body if field not in KNOWN]:
        raise invalid(f"unrecognized request argument: {unknown[0][:100]!r}", unknown[0][:100], "unknown_parameter")
    if given.get("model", name) != name:
        raise Refused(404, f"the model {str(given['model'])[:100]!r} does not exist: this server has {name!r}", "model",
                      "model_not_found", MISSING)  # fmt: skip
    refuse_unsupported(given)
    n = whole(given, "n", 1, 1, bounds.max_texts)
    if whole(given, "best_of", n, 1) != n:
        raise invalid("best_of must equal n: texts are not ranked", "best_of")
    prompts = read_prompts(given.get("prompt"))
    if len(prompts) * n > bounds.max_texts:
        raise invalid(
            f"{len(prompts)} prompts with n {n} are {len(prompts) * n} texts, and one request may have "
            f"{bounds.max_texts}", "prompt",
        )  # fmt: skip
    logprobs = whole(given, "logprobs", 0, 0, MOST_LOGPROBS) if "logprobs" in given else None
    echo, stream = flag(given, "echo"), flag(given, "stream")
    most = whole(given, "max_tokens", DEFAULT_TOKENS, 0 if echo else 1, bounds.max_tokens)
    return Asked(
        prompts=prompts,
        n=n,
        sampling=read_sampling(given),
        limits=Limits(max(1, most), read_stops(given.get("stop")), logprobs=logprobs),
        scores=echo and logprobs is not None,
        echo=echo,
        writes=most > 0,
        stream=stream,
        usage=read_stream_options(given.get("stream_options"), stream),
    )


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    for field in ("presence_penalty", "frequency_penalty"):
        if given.get(field, 0) != 0:
            raise invalid(f"{field} is not supported: leave it out, or use repetition_penalty", field)
    if given.get("suffix", "") != "":
        raise invalid("suffix is not supported: the models write from left to right", "suffix")


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """A text, several, a list of ids, or several of these; nothing is the beginning of a text."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not isinstance(prompt, list) or not prompt:
        raise invalid(
            "prompt must be a string, a list of strings, a list of token ids, or a list of such lists", "prompt"
        )
    if is_ids(prompt):
        return [prompt]
    if all(isinstance(part, str) for part in prompt) or all(isinstance(part, list) and is_ids(part) for part in prompt):
        return prompt
    raise invalid("prompt must be all strings, all token ids, or all lists of token ids, none of them empty", "prompt")


def is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(token) is int and abs(token) < 1 << 31 for token in value)


def read_sampling(given: Mapping[str, Any]) -> Sampling:
    values = {"temperature": 1.0} | {field: given[field] for field in SAMPLING if field in given}
    try:
        return Sampling(**values, logit_bias=read_biases(given.get("logit_bias", {})))
    except RequestError as error:
        field = str(error).split(" ", 1)[0]
        raise invalid(str(error)[:300], field if field in KNOWN else None) from error


def read_biases(biases: Any) -> dict[int, float]:
    """JSON's keys are strings."""
    if not isinstance(biases, dict) or len(biases) > MOST_BIASES:
        raise invalid(f"logit_bias must map at most {MOST_BIASES} token ids to numbers", "logit_bias")
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in biases):
        raise invalid("logit_bias must map token ids to numbers", "logit_bias")
    if not all(is_number(bias) and abs(bias) <= 100 for bias in biases.values()):
        raise invalid("logit_bias must map token ids to numbers from -100 to 100", "logit_bias")
    return {int(token): float(bias) for token, bias in biases.items()}


def read_stops(stop: Any) -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise invalid(f"stop must be a string or a list of at most {MOST_STOPS}", "stop")
    if not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stops):
        raise invalid(f"a stop must be a string of 1 to {LONGEST_STOP} characters", "stop")
    return stops


def read_stream_options(options: Any, stream: bool) -> bool:
    """Whether usage was asked for. `include_obfuscation` pads chunks against eavesdroppers; nothing is padded here."""
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options is for stream: true", "stream_options")
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise invalid("stream_options may have include_usage", "stream_options")
    return flag(options, "include_usage")


def whole(given: Mapping[str, Any], field: str, default: int, least: int, most: int | None = None) -> int:
    value = given.get(field, default)
    if not is_whole(value) or value < least or (most is not None and value > most):
        shown = value if is_number(value) else type(value).__name__
        limit = f"{least} or above" if most is None else f"from {least} to {most}"
        raise invalid(f"{field} must be a whole number {limit}, not {shown}", field)
    return int(value)


def flag(given: Mapping[str, Any], field: str) -> bool:
    value = given.get(field, False)
    if not isinstance(value, bool):
        raise invalid(f"{field} must be true or false", field)
    return value


def encode(model: Model, asked: Asked) -> list[Ids]:
    """Token ids of each prompt. Raises Refused for one that the model cannot read. Takes long for long texts."""
    try:
        asked.sampling.check_vocabulary(model.vocab_size)
        asked.limits.check_vocabulary(model.vocab_size)
    except RequestError as error:
        raise invalid(str(error), "logit_bias") from error
    if asked.limits.stops and model.codec is None:
        raise invalid("this model has no tokenizer, so stop strings cannot be matched: leave stop out", "stop")
    ids = []
    for number, prompt in enumerate(asked.prompts, start=1):
        try:
            ids.append(encode_one(model, prompt or beginning(model)))
        except Refused as error:
            if len(asked.prompts) > 1:
                raise invalid(f"prompt {number} of {len(asked.prompts)}: {error}", error.param, error.code) from error
            raise
    return ids


def encode_one(model: Model, prompt: str | list[int]) -> Ids:
    """Token ids; a text that cannot fit is refused before it is tokenised."""
    most = model.context * MOST_BYTES_PER_TOKEN
    try:
        if isinstance(prompt, str) and (size := len(utf8(prompt))) > most:
            raise too_long(model, f"the prompt has {size} bytes, which are more than {most} and so more tokens")
        check_beginning(model, prompt)
        tokens = model.encode(prompt) if isinstance(prompt, str) else prompt
        if len(tokens) > model.context:
            raise too_long(model, f"the prompt has {len(tokens)} tokens")
        return check_ids(tokens, model.vocab_size, model.context)
    except RequestError as error:
        raise invalid(str(error), "prompt") from error


def check_beginning(model: Model, prompt: str | list[int]) -> None:
    """Refuse a text of whose beginning alone twice the context's tokens can be made. Tokenising all of the longest text
    that may fit takes 0.4 s (GPT-2), its beginning 0.02 s: a few clients with such texts would keep all others waiting.
    """
    if isinstance(prompt, str) and len(prompt) > model.context * MANY_CHARACTERS:
        most = 2 * model.context
        if len(model.encode(prompt[: model.context * MANY_CHARACTERS])) > most:
            raise too_long(model, f"the prompt has more than {most} tokens")


def too_long(model: Model, what: str) -> Refused:
    message = f"this model's maximum context length is {model.context} tokens, and {what}: shorten it"
    return invalid(message, "prompt", "context_length_exceeded")


def beginning(model: Model) -> list[int]:
    """What an empty prompt means: the beginning of a text, for GPT-2 the end of the one before it."""
    if model.manifest.prefix:
        return model.manifest.prefix
    if model.end_of_text is None:
        raise invalid("the prompt is empty, and this model has no token that begins a text: give some text", "prompt")
    return [model.end_of_text]
