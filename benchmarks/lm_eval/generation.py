"""The generation settings of the lm-evaluation-harness (`generation_kwargs`, `--gen_kwargs`) for this runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import RequestError
from runtime.model import Model
from runtime.sampling import SamplingOptions
from runtime.truncation import LEFT, shortened

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting, in order
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
IDLE = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}  # settings that ask for what happens anyway
MOST_NEW = 256  # tokens, where neither task nor user sets it; less in a small context
TOGETHER = 16  # prompts, for batch_size=auto


@dataclass(frozen=True)
class Settings:
    """How the prompts of one group are continued."""

    max_new_tokens: int
    until: tuple[str, ...]  # strings that end a text and are cut from it
    sampling: SamplingOptions


def settings_of(given: Mapping[str, Any], context: int, most: int | None = None) -> Settings:
    """Settings from what a task and `--gen_kwargs` give.

    As in the harness, do_sample=False is greedy whatever the temperature, and without do_sample a temperature above 0
    samples. most: new tokens where nothing else is given. Raises RequestError for a setting that does not exist here
    or leaves no room for a prompt.
    """
    rest = dict(given)
    lengths = [value for name in LENGTHS if (value := rest.pop(name, None)) is not None]
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    sampling = sampling_of(rest.pop("do_sample", None), rest.pop("temperature", None))
    options = {name: value for name in SAMPLING if (value := rest.pop(name, None)) is not None}
    if unknown := {name: value for name, value in rest.items() if name not in IDLE or value != IDLE[name]}:
        raise RequestError(
            f"the generation setting {', '.join(f'{name}={value}' for name, value in unknown.items())} does not exist "
            f"here: leave it out; there are until, {LENGTHS[0]}, do_sample, temperature, {', '.join(SAMPLING)}"
        )
    room = whole(LENGTHS[0], lengths[0]) if lengths else min(most or MOST_NEW, max(1, context // 2))
    if not 1 <= room < context:
        raise RequestError(
            f"{LENGTHS[0]}={room} leaves no room for a prompt in the context of {context} tokens: set it from 1 to "
            f"{context - 1}, for example --gen_kwargs {LENGTHS[0]}={context // 2}"
        )
    if sampling["temperature"]:
        sampling.update(options)  # type: ignore[typeddict-item]
    elif "repetition_penalty" in options:
        sampling["repetition_penalty"] = float(options["repetition_penalty"])
    return Settings(room, tuple(text for text in until if text), sampling)


def whole(name: str, value: Any) -> int:
    """A setting as a whole number. Raises RequestError.

    >>> whole("batch_size", "4")
    4
    """
    try:
        return int(value)
    except (TypeError, ValueError):
        raise RequestError(f"{name}={value} must be a whole number") from None


def sampling_of(do_sample: bool | None, temperature: float | None) -> SamplingOptions:
    """The temperature that the harness's two settings ask for. Raises RequestError where they contradict."""
    if do_sample is None:
        do_sample = bool(temperature)
    if do_sample and temperature is not None and not temperature > 0:
        raise RequestError(
            f"do_sample=True with temperature={temperature}: set a temperature above 0, or do_sample=False"
        )
    return {"temperature": (1.0 if temperature is None else float(temperature)) if do_sample else 0.0}


def continued(
    model: Model,
    prompts: Sequence[list[int]],
    settings: Settings,
    together: int = 1,
    seed: int = 0,
    done: Callable[[int, str], object] = lambda prompt, text: None,
) -> list[str]:
    """The new text of each prompt (token ids, at least one each), without stop strings.

    A prompt that is too long loses its first tokens, so that max_new_tokens fit behind it. Prompt i draws with
    seed + i. done: called with each prompt's index and text.
    """
    texts: list[str] = []
    room = model.context - settings.max_new_tokens
    prefix = model.manifest.prefix
    for first in range(0, len(prompts), together):
        group = [
            shortened(ids, room, LEFT, len(prefix) if ids[: len(prefix)] == prefix and len(prefix) < room else 0)
            for ids in prompts[first : first + together]
        ]
        drawn: SamplingOptions = {**settings.sampling, "seed": seed + first}
        made = model.stream(group, settings.max_new_tokens, stop=settings.until, **drawn)
        for _ in made:
            pass
        for number, writing in enumerate(made.texts, start=first):  # type: ignore[union-attr]
            texts.append(writing.text)
            done(number, writing.text)
    return texts
