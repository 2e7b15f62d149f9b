"""Which fields of a foreign tokenizer's settings reach Transformers. Standard library only.

tokenizer_config.json and special_tokens_map.json become arguments of the library's classes. Some name other files to
read, anywhere on the machine (fast_tokenizer_files, gguf_file), or code, so fields are taken from a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
PASSED_ON = {  # and each *_token
    "tokenizer_class", "backend", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", "errors", "trim_offsets", "model_max_length", "max_len", "padding_side", "truncation_side",
    "model_input_names", "clean_up_tokenization_spaces", "split_special_tokens", "do_lower_case", "strip_accents",
    "tokenize_chinese_chars", "legacy",
}  # fmt: skip
# No setting of GPT-2's tokenizer: what Transformers writes of the place and the classes it read.
REMARKS = {"is_local", "local_files_only", "use_fast", "init_inputs", "fast_tokenizer_files", "files_loaded"}


def passed_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the library gets.

    >>> passed_on({"eos_token": "<|endoftext|>", "add_bos_token": True, "tokenizer_file": "/etc/passwd"})
    {'eos_token': '<|endoftext|>', 'add_bos_token': True}
    """
    return {name: value for name, value in settings.items() if name in PASSED_ON or name.endswith("_token")}


def unused(settings: Mapping[str, Any]) -> list[str]:
    """Names of the other fields, without those that can only be a remark: null, false or a text.

    >>> unused({"eos_token": "<|endoftext|>", "name_or_path": "gpt2", "is_local": True, "gguf_file": "x", "depth": 3})
    ['depth']
    """
    others = {name: value for name, value in settings.items() if name not in {*passed_on(settings), *REMARKS}}
    return [name for name, value in others.items() if not (value is None or value is False or isinstance(value, str))]
