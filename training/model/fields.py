"""The fields of config.json: valid values, fields copied from a GPT-2, refused fields. Standard library only.

One table for the config.json of a DMPT and of a GPT-2. A GPT-2's fields are those of Transformers' GPT2Config. A field
that would change what the network computes is obeyed or refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import InputError
from training.model.domains import is_served

LARGEST = 1 << 24  # largest size; the product of two still counts elements without overflow
TOKENS = ("bos_token_id", "eos_token_id")
ALIASES = {  # GPT2Config.attribute_map: the alias wins where a file has both
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def whole(value: Any, least: int = 1, most: int = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def number(value: Any) -> bool:
    """A finite number: Python's JSON also reads NaN and Infinity, and true equals 1."""
    return type(value) in (int, float) and abs(value) < float("inf")


@dataclass(frozen=True)
class Kind:
    """The valid values of a field, in words and as a check."""

    words: str
    fits: Callable[[Any], bool]


SIZE = Kind(f"a whole number from 1 to {LARGEST}", whole)
SIZE_OR_NULL = Kind(f"a whole number from 1 to {LARGEST}, or null", lambda value: value is None or whole(value))
POSITIVE = Kind("a number above 0", lambda value: number(value) and value > 0)
SHARE = Kind("a number from 0 to below 1", lambda value: number(value) and 0 <= value < 1)
SPREAD = Kind("a number of at least 0", lambda value: number(value) and value >= 0)
WHOLE_OR_NULL = Kind("a whole number or null", lambda value: value is None or type(value) is int)
COUNT = Kind("a whole number, 0 or above", lambda value: whole(value, 0))
FLAG = Kind("true or false", lambda value: type(value) is bool)
NAME = Kind("a name", lambda value: isinstance(value, str))
INDICES = Kind("a list of whole numbers", lambda value: type(value) is list and {*map(type, value)} <= {int})
DOMAINS = Kind(
    'an object such as {"code": "left", "prose": [4, 5]}, or null',
    lambda value: value is None or (isinstance(value, dict) and all(map(is_served, value.values()))),
)
TOKEN = Kind(f"a token id from 0 to {LARGEST} or null", lambda value: value is None or whole(value, 0))
END = Kind(
    f"a token id from 0 to {LARGEST}, a list of token ids, or null",
    lambda value: value is None or all(whole(token, 0) for token in (value if type(value) is list else [value])),
)

GPT2: dict[str, Kind] = {  # copied to the DMPT
    "vocab_size": SIZE,
    "n_positions": SIZE,
    "n_embd": SIZE,
    "n_layer": SIZE,
    "n_head": SIZE,
    "n_inner": SIZE_OR_NULL,
    "activation_function": NAME,
    "resid_pdrop": SHARE,
    "embd_pdrop": SHARE,
    "attn_pdrop": SHARE,
    "layer_norm_epsilon": POSITIVE,
    "initializer_range": SPREAD,
    "tie_word_embeddings": FLAG,
    "bos_token_id": TOKEN,
    "eos_token_id": END,
}
DMPT: dict[str, Kind] = {  # a DMPT's own
    "gate_hidden": SIZE,
    "gate_temp": POSITIVE,
    "head_gate_temp": POSITIVE,
    "fast_k": WHOLE_OR_NULL,
    "head_topk": WHOLE_OR_NULL,
    "splits": INDICES,
    "head_kind": NAME,
    "head_rank": SIZE_OR_NULL,
    "shared_anchor": FLAG,
    "next_tokens": COUNT,
    "domains": DOMAINS,
}
# Fields of a GPT-2 that would change what is computed: only these values are supported.
FIXED: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "is_decoder": (False, True, None),
    "architectures": (None, [], ["GPT2LMHeadModel"], ["GPT2Model"], ["GPT2DoubleHeadsModel"]),
}
# Fields of a GPT-2 that Transformers' own classes get, to compare their results. Others can make them fetch and run
# code: `_attn_implementation` names a kernel (CVE-2026-4372).
COMPARED = {*GPT2, *ALIASES, "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"}
# Fields of a DMPT's config.json that are read and reach Transformers' classes, for the same reason.
OWN = {*GPT2, *DMPT, "head_allocation", "model_type", "quantization", "training", "pad_token_id"}
WHY = {
    "quantization_config": "the model was quantized by another tool: give the float model it was made from",
    "auto_map": "the model contains custom code, which is not run: only Transformers' own GPT-2 is supported",
    "architectures": "only GPT-2 language models are supported, not classifiers",
}
# Fields that do not change what the network computes: training, metadata, heads that a language model lacks.
# reorder_and_upcast_attn only guards float16.
HARMLESS = {
    "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "n_ctx", "reorder_and_upcast_attn",
    "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "gradient_checkpointing", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "tokenizer_class",
    "task_specific_params", "return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "chunk_size_feed_forward", "tie_encoder_decoder", "prefix", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "predict_special_tokens", "line_by_line", "output_past", "attn_implementation", "license",
}  # fmt: skip
# Fields that other libraries may read of a GPT-2's config.json.
PLAIN = {*COMPARED, *FIXED, *HARMLESS} - {"attn_implementation"}
# Generation settings, in generation_config.json or, written by older Transformers, in config.json. Settings that ban or
# force tokens are refused unless they have one of these values. The rest are defaults of Transformers' generate(),
# which `run` takes as options.
CHOOSING: dict[str, tuple[Any, ...]] = {
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
}
# name -> its default, which has no effect
SAMPLING: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "min_p": None,
    "repetition_penalty": 1.0, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 1.0,
    "early_stopping": False, "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None,
    "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False, "remove_invalid_values": False,
    "penalty_alpha": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "renormalize_logits": False,
}  # fmt: skip


def check_fields(fields: Mapping[str, Any], own: bool) -> None:
    """Raise InputError naming the first field with a value of the wrong kind. own: a DMPT's config.json."""
    for name, kind in {**GPT2, **(DMPT if own else {})}.items():
        if name in fields and not kind.fits(fields[name]):
            raise InputError(f"{name} must be {kind.words}, not {fields[name]!r}")
    size: Any = fields.get("vocab_size")
    if own and whole(size):
        for name in TOKENS:
            for token in tokens(fields.get(name)):
                if token >= size:
                    raise InputError(f"{name} must be a token id from 0 to {size - 1} or null, not {token}")


def own_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the fields of a DMPT's config.json that define it, names of fields that are not used).

    Raises InputError for custom code and for another tool's quantization.
    """
    for name in ("auto_map", "quantization_config"):
        if fields.get(name) is not None:
            raise InputError(f"{name} is {fields[name]!r}: {WHY[name]}")
    known = {*OWN, *FIXED, *HARMLESS, *CHOOSING, *SAMPLING}
    unused = [name for name, value in fields.items() if name not in known and not name.startswith("_") and value]
    return {name: value for name, value in fields.items() if name in OWN}, unused


def tokens(value: Any) -> list[int]:
    """A field of token ids (null, one or several) as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def without_aliases(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A GPT-2's fields with aliases resolved, as GPT2Config does."""
    out = {name: value for name, value in fields.items() if name not in ALIASES}
    return out | {own: fields[alias] for alias, own in ALIASES.items() if alias in fields}


def check_known(fields: Mapping[str, Any]) -> list[str]:
    """Names of a GPT-2's fields that are not used; raises InputError for fields that might change the computation.

    A field outside this table is harmless if it can only be a remark: null, false, a text, or a name with a leading
    underscore.
    """
    for name, values in FIXED.items():
        if name in fields and fields[name] not in values:
            why = WHY.get(name, f"only GPT-2's {values[0]!r} is supported")
            raise InputError(f"{name} is {fields[name]!r}: {why}")
    unused = check_generation(fields)
    known = {*GPT2, *FIXED, *HARMLESS, *CHOOSING, *SAMPLING}
    unknown = {name: value for name, value in fields.items() if name not in known}
    for name, value in unknown.items():
        if not (value is None or value is False or isinstance(value, str) or name.startswith("_")):
            raise InputError(
                f"{name} is {value!r}, a field that GPT-2 does not have: it might change what the model computes. "
                "If it does not, remove it from config.json"
            )
    return [*unused, *(name for name in unknown if not name.startswith("_"))]


def check_generation(fields: Mapping[str, Any]) -> list[str]:
    """Names of generation settings that are set but not applied; raises InputError for those that choose tokens."""
    for name, values in CHOOSING.items():
        if name in fields and fields[name] not in values:
            raise InputError(
                f"{name} is {fields[name]!r}, which changes the generated tokens and is not supported: "
                "remove it and apply it in your own program"
            )
    return [name for name, usual in SAMPLING.items() if fields.get(name, usual) not in (usual, None)]
