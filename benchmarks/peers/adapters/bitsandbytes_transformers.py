"""The peer bitsandbytes: int8 or nf4 weights inside Transformers' GPT-2. The tied head stays in float.

Weights are quantized while the float folder is loaded, as in a user's from_pretrained(), and count in the load time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.adapters import FACTS
from benchmarks.peers.adapters.torch_transformers import Transformers


def load(path: str, threads: int | None, device: str) -> Transformers:
    facts = json.loads((Path(path) / FACTS).read_text(encoding="utf-8"))
    return Transformers(quantized(facts["source"], facts["scheme"]), threads)


def quantized(source: str, scheme: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig, GPT2LMHeadModel

    schemes: dict[str, dict[str, Any]] = {
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    }
    return GPT2LMHeadModel.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**schemes[scheme]), device_map="cpu", torch_dtype=torch.float32,
        local_files_only=True, use_safetensors=True,
    )  # fmt: skip


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Stores only the folder's path, with the sizes of the weights in memory."""
    Path(out).mkdir(parents=True, exist_ok=True)
    model = quantized(source, scheme)
    size = sum(bytes_of(parameter) for parameter in model.parameters())
    touched = size - bytes_of(model.transformer.wpe.weight)
    return {"source": source, "scheme": scheme, "size_bytes": size, "touched_bytes": touched}


def bytes_of(weight: Any) -> int:
    """Bytes of a parameter with its scales, which bitsandbytes stores as its attributes."""
    scales = [getattr(weight, "SCB", None), getattr(getattr(weight, "quant_state", None), "absmax", None)]
    return int(weight.nbytes + sum(scale.nbytes for scale in scales if scale is not None))
