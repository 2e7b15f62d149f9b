"""The model class `dmpt` of the lm-evaluation-harness: an exported folder, run by ONNX Runtime without torch.

Importing this module registers the class. The harness (0.4.13) has a fixed list of its own models and looks for no
others, so something must import it: `python -m benchmarks.lm_eval` does, with the harness's own arguments, and so can a
program that calls `lm_eval.simple_evaluate(model="dmpt", model_args={"path": "device"}, tasks=[...])`.

What is scored follows the harness's own class for GPT-2, HFLM: the prefix token of empty contexts and of documents is
the end of text (or the model's own beginning of text); documents are read in disjoint windows of the whole context;
what is too long loses its first tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (the harness lists its own models only while no other is registered)
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import runtime
from benchmarks.lm_eval.generation import MOST_NEW, TOGETHER, continued, settings_of, whole
from benchmarks.lm_eval.likelihood import Answer, Likelihoods, Pair
from runtime.errors import RequestError
from runtime.manifest_file import read_manifest
from runtime.text import utf8

NO_CHAT = "has no chat template: leave --apply_chat_template out"


@register_model("dmpt")
class DMPTLM(TemplateLM):
    """An exported folder for the harness. The arguments are those of `--model_args`, all but `path` optional.

    path: the folder that `dmpt-export onnx` made. threads: CPU threads. device: "cpu" or "cuda"; the folder's target
    unless given. batch_size: prompts continued together by generate_until (auto: 16); log-likelihoods need no batches.
    max_gen_toks: new tokens where a task does not say. seed: of sampled text.
    Raises the errors of runtime.load, and RequestError.
    """

    def __init__(
        self,
        path: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if path is None or unknown:
            fault = f"unknown {', '.join(unknown)}" if unknown else "no path"
            raise RequestError(
                f"--model_args: {fault}; give path=DEVICE, the folder of `dmpt-export onnx`, and if needed threads, "
                "device, max_gen_toks, seed"
            )
        path = str(path)  # the harness reads a folder named 2024 as a number
        self.model = runtime.load(path, device=device_for(path, device), threads=threads)
        self.model.codec or self.model.encode("")  # the error for a folder without a tokenizer
        config = self.model.manifest.config
        self.prefix = config.bos_token_id if config.bos_token_id is not None else self.model.end_of_text
        if self.prefix is None:
            raise RequestError(f"{path} names no end-of-text token, which the harness puts before every document")
        automatic = isinstance(batch_size, str) and batch_size.startswith("auto")
        self.together = TOGETHER if automatic else whole("batch_size", batch_size)
        if self.together < 1:
            raise RequestError(f"batch_size={batch_size}: set it to 1 or above, or to auto")
        self.most_new, self.seed = max_gen_toks, seed
        self.likelihoods = Likelihoods(self.model)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> DMPTLM:
        """As the harness's own, but a device or batch size in --model_args wins over its defaults."""
        return cls(**{**{k: v for k, v in (additional_config or {}).items() if v is not None}, **arg_dict})

    # --- what the harness asks ----------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        assert self.prefix is not None
        return self.prefix if self.model.end_of_text is None else self.model.end_of_text

    @property
    def prefix_token_id(self) -> int:
        assert self.prefix is not None
        return self.prefix

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.model.context

    @property
    def max_gen_toks(self) -> int:
        return self.most_new or min(MOST_NEW, max(1, self.model.context // 2))

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Token ids; the folder's prefix stands in front unless add_special_tokens is False or the text begins so."""
        assert self.model.codec is not None
        utf8(string)
        ids: list[int] = self.model.codec.tokenizer.encode(string, add_special_tokens=False).ids
        prefix = [] if add_special_tokens is False else self.model.manifest.prefix
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        assert self.model.codec is not None
        text: str = self.model.codec.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template:
            raise RequestError(f"{self.model.folder} {NO_CHAT}")
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise RequestError(f"{self.model.folder} {NO_CHAT}")

    # --- log-likelihoods ----------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[Answer]:
        """requests: (texts or None, context ids, continuation ids). The harness's `loglikelihood` makes them."""
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood", unit="request") as bar:
            answers = self.likelihoods.score(pairs, lambda answered: bar.update(answered - bar.n))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text after the prefix token, in disjoint windows of the context."""
        totals = []
        for (text,) in tqdm(
            [r.args for r in requests], disable=disable_tqdm, desc="loglikelihood_rolling", unit="text"
        ):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            total = sum(answer for answer, _ in self.likelihoods.score([*map(make_disjoint_window, windows)]))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    # --- text ---------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt, cut before the first of its `until` strings."""
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until", unit="prompt") as bar:
            for members in grouped([request.args[1] for request in requests]):
                group = [requests[i].args for i in members]
                settings = settings_of(group[0][1], self.max_length, self.most_new)
                prompts = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt, _ in group]

                def done(at: int, text: str, group: Any = group, members: Any = members) -> None:
                    texts[members[at]] = text
                    self.cache_hook.add_partial("generate_until", group[at], text)
                    bar.update()

                continued(self.model, prompts, settings, self.together, self.seed, done)
        return texts


def device_for(path: str, wanted: str | None) -> str:
    """ "cpu" or "cuda". The harness asks for cuda:0 where the user asks for nothing, so a folder that is exported for
    the CPU runs there whatever is asked."""
    target = read_manifest(Path(path)).target
    return "cpu" if target == "cpu" or (wanted or target).startswith("cpu") else "cuda"


def grouped(settings: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of requests with equal settings."""
    groups: list[tuple[Mapping[str, Any], list[int]]] = []
    for index, own in enumerate(settings):
        for other, members in groups:
            if own == other:
                members.append(index)
                break
        else:
            groups.append((own, [index]))
    return [members for _, members in groups]
