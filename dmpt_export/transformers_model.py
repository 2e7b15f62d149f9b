"""An exported model as a Transformers model: full generate() and pipelines.

>>> from dmpt_export import DMPTOnnxForCausalLM                          # doctest: +SKIP
>>> model = DMPTOnnxForCausalLM.from_pretrained("device")
>>> pipe = pipeline("text-generation", model=model, tokenizer=PreTrainedTokenizerFast.from_pretrained("device"))

A single text runs as in `runtime`, one path for each token; several rows (batches, beams) run every path for all.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.errors import InputError
from training.model.config import DMPTConfig

if TYPE_CHECKING:
    from runtime.model import Model

Float32s = NDArray[np.float32]
HEADS = ("head_kind", "head_rank", "shared_anchor")  # absent from older exports
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "splits", "fast_k", "head_topk", "bos_token_id",
         "eos_token_id")  # fmt: skip


class DMPTOnnxConfig(DMPTConfig):
    """The configuration of an exported model, from its manifest."""

    model_type = "dmpt_onnx"


class Rows:
    """The cache that generate() passes from step to step: the rows' keys and values, held by the runtime."""

    def __init__(self, model: Model, rows: int) -> None:
        self.length = 0  # tokens seen by generate(), padding included
        self.single = model.sequence() if rows == 1 else None
        self.batch = model.batch(rows) if rows > 1 else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Transformers' name for `length`."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` (B,), for beam search."""
        if self.batch is not None:
            self.batch.reorder(beam_idx.cpu().numpy())

    def crop(self, length: int) -> None:
        """Drop all but the first `length` tokens, for lookup decoding, which has a single row."""
        assert self.single is not None
        self.single.rewind(self.single.length - (self.length - length))
        self.length = length

    def feed(self, rows: list[NDArray[np.int64]], last: int) -> Float32s:
        """Append tokens to every row: log-probs [B, last, V] of its last positions.

        Raises RequestError when a row's context is full, InputError when a row has fewer than `last` tokens or for
        another number of rows.
        """
        held = 1 if self.batch is None else len(self.batch)
        if len(rows) != held:
            raise InputError(f"past_key_values holds {held} rows, input_ids has {len(rows)}")
        if min(map(len, rows)) < last:
            raise InputError(f"logits of {last} tokens were requested, but some of these are padding")
        if self.single is not None:
            return self.single.feed(rows[0], last)[0][None]
        steps = [self.append([ids[: len(ids) + 1 - last] for ids in rows])]
        steps += [self.append([ids[len(ids) + i :][:1] for ids in rows]) for i in range(1 - last, 0)]
        return np.stack(steps, axis=1)

    def append(self, rows: list[NDArray[np.int64]]) -> Float32s:
        """Several rows: [B, V]. One token each in one run, prompts row by row."""
        assert self.batch is not None
        together = all(len(ids) == 1 for ids in rows)
        return (self.batch.step(np.concatenate(rows)) if together else self.batch.feed(rows))[0]


class DMPTOnnxForCausalLM(PreTrainedModel, GenerationMixin):
    """An ONNX folder with generate(): greedy, sampling, beams, logits processors, left-padded batches.

    Logits are the deployed log-probs. Inputs on another device get outputs on that device, computed by ONNX Runtime.
    """

    config_class = DMPTOnnxConfig
    main_input_name = "input_ids"

    def __init__(self, model: Model) -> None:
        """model: from `runtime.load`; from_pretrained() takes a folder."""
        raw = model.manifest.raw
        fields = {name: raw["config"][name] for name in (*SIZES, *(name for name in HEADS if name in raw["config"]))}
        if len(model.manifest.ends) > 1:
            fields["eos_token_id"] = model.manifest.ends
        super().__init__(DMPTOnnxConfig(**fields, head_allocation=raw["head_allocation"], tie_word_embeddings=False))
        self.runtime = model
        self.register_buffer("place", torch.zeros(1), persistent=False)  # follows .to(), as parameters would
        self.post_init()
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        *,
        verify: bool = True,
        deterministic: bool = False,
    ) -> DMPTOnnxForCausalLM:
        """Open a folder made by `dmpt-export onnx`; arguments and errors are those of `runtime.load`."""
        import runtime

        loaded = runtime.load(folder, device=device, threads=threads, verify=verify, deterministic=deterministic)
        return cls(loaded)

    def save_pretrained(self, save_directory: str | PathLike[str], *_: Any, **__: Any) -> None:
        """Raises InputError: the folder is the model."""
        raise InputError(f"an exported model is its folder: copy {self.runtime.folder} to {Path(save_directory)}")

    @property
    def device(self) -> torch.device:
        place: Tensor = self.get_buffer("place")
        return place.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Rows | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: object,
    ) -> CausalLMOutputWithPast:
        """Log-probs as logits: input_ids (B, S), attention_mask (B, past + S) with 0 at left padding -> (B, N, V).

        N is logits_to_keep, or S for 0; rows of padding are uniform. Raises InputError for padding that is not on the
        left, shapes that do not fit, labels and inputs_embeds; RequestError for tokens beyond the vocabulary or the
        context. Other arguments of Transformers' models have no effect.
        """
        if input_ids is None or any(others.get(name) is not None for name in ("labels", "inputs_embeds")):
            raise InputError("an exported model takes input_ids, not labels or inputs_embeds")
        rows = unpadded(input_ids, attention_mask)
        if not (past_key_values is None or isinstance(past_key_values, Rows)):
            raise InputError("past_key_values must come from this model: leave it out, the model makes its own")
        if type(logits_to_keep) is not int or logits_to_keep < 0:
            raise InputError(f"logits_to_keep {logits_to_keep!r} must be a whole number, 0 for all")
        last = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        if past_key_values is None and use_cache:
            past_key_values = Rows(self.runtime, len(rows))
            kept = past_key_values.feed(rows, 1)
            found = kept if last == 1 else self.scored(rows, last)
        elif past_key_values is None:
            found = self.scored(rows, last)
        else:
            found = past_key_values.feed(rows, last)
        if past_key_values is not None:
            past_key_values.length += input_ids.shape[1]
        logits = torch.from_numpy(found).to(input_ids.device)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def scored(self, rows: list[NDArray[np.int64]], last: int) -> Float32s:
        """Without a cache: (B, last, V), each row on its own."""
        found = np.full((len(rows), last, self.config.vocab_size), -np.log(self.config.vocab_size), np.float32)
        for out, ids in zip(found, rows, strict=True):
            real = min(last, len(ids))
            out[last - real :] = self.runtime.score(ids, real)[0]
        return found

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Rows | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        cache: Rows | None = None,  # passed as past_key_values by generate() of Transformers 5
        **_: object,
    ) -> dict[str, Any]:
        past_key_values = cache if past_key_values is None else past_key_values
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, "use_cache": use_cache}
        return inputs | {"attention_mask": attention_mask, "logits_to_keep": 1}

    def _assisted_decoding(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super()._assisted_decoding(*arguments, **options)
        except RuntimeError as error:
            if "requires a cache" not in str(error):
                raise
            raise InputError(
                "this version of Transformers does lookup decoding only with its own cache: use runtime.load(FOLDER)"
                ".generate(..., speculate=N), or Transformers 4.57"
            ) from error

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # keys and values live in the runtime: forward() makes its own cache

    @staticmethod
    def _reorder_cache(past_key_values: Rows, beam_idx: Tensor) -> Rows:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def close(self) -> None:
        """Free the graph and its weights now."""
        self.runtime.close()


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[NDArray[np.int64]]:
    """Each row's own new tokens: (B, S), mask (B, past + S) -> B arrays. Raises InputError unless padding is left."""
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InputError(f"input_ids {list(input_ids.shape)} must be rows of one token or more")
    ids = input_ids.cpu().numpy()
    if attention_mask is None:
        return list(ids)
    if attention_mask.ndim != 2 or len(attention_mask) != len(ids) or attention_mask.shape[1] < ids.shape[1]:
        raise InputError(
            f"attention_mask {list(attention_mask.shape)} does not fit input_ids {list(input_ids.shape)}: "
            "give a row of 0 and 1 for each row"
        )
    real = attention_mask[:, -ids.shape[1] :].cpu().numpy() != 0
    if not (real[:, -1].all() and (np.diff(real.astype(np.int8), axis=1) >= 0).all()):
        raise InputError("attention_mask has zeros that are not on the left: set tokenizer.padding_side = 'left'")
    return [row[mask] for row, mask in zip(ids, real, strict=True)]


# Register the class for pipelines, which warn about a model that is not listed for their task.
AutoConfig.register(DMPTOnnxConfig.model_type, DMPTOnnxConfig, exist_ok=True)
AutoModelForCausalLM.register(DMPTOnnxConfig, DMPTOnnxForCausalLM, exist_ok=True)
