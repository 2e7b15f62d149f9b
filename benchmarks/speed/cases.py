"""Test cases: prefill of a number of tokens, or decoding of a number of tokens after a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from training.errors import FieldError


@dataclass(frozen=True)
class Case:
    """One test, named as in llama-bench: pp, `tokens` fed at once into an empty sequence; or tg, `tokens` decoded
    greedily, one by one, after `depth` tokens that are fed untimed."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    evict: bool = False  # before every step other memory is read, so that no cache holds weights

    @property
    def name(self) -> str:
        """
        >>> Case("pp", 512).name, Case("tg", 128, 512).name, Case("tg", 128, 512, evict=True).name
        ('pp512', 'tg128 @ d512', 'tg128 @ d512, evicted')
        """
        depth = f" @ d{self.depth}" if self.kind == "tg" else ""
        return f"{self.kind}{self.tokens}{depth}{', evicted' * self.evict}"


@dataclass(frozen=True)
class Workload:
    """The tests of every model in a round: several numbers make several tests.

    Prompt and gen shrink to the context; depth and the `fixed` ones do not, and must fit it.
    """

    prompt: int | Sequence[int] = 128  # tokens fed at once
    gen: int | Sequence[int] = 64  # tokens decoded one by one
    depth: Sequence[int] | None = None  # tokens before the decoded ones; None: the first prompt
    fixed_prompt: bool = False
    fixed_gen: bool = False
    evict: bool = False  # time decoding a second time, with evicted weights

    def cases(self, context: int) -> list[Case]:
        """The tests for a context, in tokens. Raises InputError when a depth or fixed size does not fit it."""
        prompts, gens = ([n] if isinstance(n, int) else n for n in (self.prompt, self.gen))
        found = cases(prompts, gens, self.depth, context, self.fixed_prompt, self.fixed_gen)
        return found + [replace(case, evict=True) for case in found if self.evict and case.kind == "tg"]


def cases(
    prompts: Sequence[int],
    gens: Sequence[int],
    depths: Sequence[int] | None,
    context: int,
    fixed_prompt: bool = False,
    fixed_gen: bool = False,
) -> list[Case]:
    """Every prompt, then every count of generated tokens after every depth (None: after the first prompt).

    Sizes shrink to the context, except `fixed` ones and depths, which must fit it; else InputError is raised.
    """
    if depths is not None:
        prompts = [fit(n, 0, context, fixed_prompt)[0] for n in prompts]
        most = max(depths)
        gens = [n if fixed_gen else min(n, max(1, context - most)) for n in gens]
        if most + max(gens) > context:
            raise FieldError(
                "{depth} {} and {gen} {} do not fit a context of {} tokens together", most, max(gens), context
            )
    else:
        first, most = fit(prompts[0], max(gens), context, fixed_prompt, fixed_gen)
        others = [fit(n, 0, context, fixed_prompt)[0] for n in prompts[1:]]
        prompts, gens, depths = [first, *others], [min(n, most) for n in gens], [first]
    found = [Case("pp", n) for n in prompts] + [Case("tg", n, d) for n in gens for d in depths]
    return list(dict.fromkeys(found))


def fit(prompt: int, gen: int, context: int, fixed_prompt: bool = False, fixed_gen: bool = False) -> tuple[int, int]:
    """Prompt and generated tokens that fit the context together; fixed ones stay unchanged or InputError is raised.

    >>> fit(128, 64, 1024), fit(128, 64, 96), fit(128, 8, 96), fit(90, 64, 96, fixed_prompt=True)
    ((128, 64), (64, 32), (88, 8), (90, 6))
    """
    if prompt + gen > context and not fixed_gen:
        gen = min(gen, max(1, context - prompt if fixed_prompt else context // 3))
    if prompt + gen > context and not fixed_prompt:
        prompt = max(1, context - gen)
    if prompt + gen > context:
        raise FieldError("{prompt} {} and {gen} {} do not fit a context of {} tokens together", prompt, gen, context)
    return prompt, gen
