"""The peer llama.cpp, through llama-cpp-python's C interface, with GGUF files written by the gguf package.

Logits are read in place and the next token is numpy's argmax, as in the other adapters. Keys and values are float16,
llama.cpp's default. The schemes are llama.cpp's own mixes: in Q4_0 the tied embedding, which is also the head, has 6.6
bits per weight (Q6_K).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.adapters.loop import Stepwise

NAMES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
TOP = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"} | {
    f"ln_f.{part}": f"output_norm.{part}" for part in ("weight", "bias")
}


class LlamaCpp(Stepwise):
    """A loaded file and a context that is cleared between turns."""

    def __init__(self, path: str, threads: int | None) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = quiet(llama_cpp)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(Path(path) / "model.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.context = int(llama_cpp.llama_model_n_ctx_train(self.model))
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self.context
        if threads:
            settings.n_threads = settings.n_threads_batch = threads
        self.state = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))
        self.threads = int(llama_cpp.llama_n_threads(self.state))
        self.native_s = 0.0

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.state), True)

    def run(self, batch: Any) -> None:
        if failed := self.api.llama_decode(self.state, batch):
            raise ValueError(f"llama_decode failed with {failed}")

    def feed(self, ids: list[int]) -> NDArray[np.float32]:
        tokens = (self.api.llama_token * len(ids))(*ids)
        start = perf_counter()
        self.run(self.api.llama_batch_get_one(tokens, len(ids)))
        logits = self.api.llama_get_logits_ith(self.state, -1)  # also waits for the result
        self.native_s = (self.native_s or 0.0) + perf_counter() - start
        return np.ctypeslib.as_array(logits, (self.vocab_size,))

    def logits(self, ids: list[int], last: int) -> NDArray[np.float32]:
        self.reset()
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = i >= len(ids) - last
            self.run(batch)
            rows = self.api.llama_get_logits(self.state)
            return np.array(np.ctypeslib.as_array(rows, (last, self.vocab_size)))
        finally:
            self.api.llama_batch_free(batch)


def load(path: str, threads: int | None, device: str) -> LlamaCpp:
    return LlamaCpp(path, threads)


def quiet(api: Any) -> Any:
    """Turn the log off; keep the result as long as the library is in use."""
    callback = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(callback, None)
    return callback


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Make a GGUF file from a Hugging Face GPT-2 folder; scheme: q8_0 or q4_0, by llama.cpp's own quantizer."""
    import llama_cpp

    kept = quiet(llama_cpp)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_f32(Path(source), folder / "f32.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme.upper()}")
    settings.nthread = 1
    failed = llama_cpp.llama_model_quantize(
        str(folder / "f32.gguf").encode(), str(folder / "model.gguf").encode(), settings
    )
    (folder / "f32.gguf").unlink()
    del kept
    if failed:
        raise ValueError(f"llama_model_quantize failed with {failed}")
    return {"touched_bytes": touched_bytes(folder / "model.gguf"), "size_bytes": (folder / "model.gguf").stat().st_size}


def touched_bytes(file: Path) -> int:
    """Bytes of all tensors, but only one row of the position embedding; the embedding is also the head."""
    import gguf

    sizes = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors}
    return int(sum(sizes.values()) - sizes["position_embd.weight"])


def write_f32(source: Path, file: Path, tokenizer: Path | None = None) -> None:
    """GPT-2's tensors under GGUF's names; feeding token ids needs no vocabulary, a server does: its tokenizer.json."""
    import gguf

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_vocabulary(writer, json.loads(tokenizer.read_text(encoding="utf-8")), config["vocab_size"])
    for name, tensor in tensors(source):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: Any, tokenizer: dict[str, Any], size: int) -> None:
    """A byte-level BPE tokenizer; ids without a token become unused ones, added tokens control tokens."""
    import gguf

    tokens, kinds = [f"[unused{n}]" for n in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)


def tensors(source: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(GGUF name, float32 array) of every weight; Conv1D's [in, out] becomes [out, in]."""
    from safetensors.numpy import load_file

    for full, tensor in load_file(source / "model.safetensors").items():
        name = full.removeprefix("transformer.")
        if name in TOP:
            yield TOP[name], tensor.astype(np.float32)
        elif name.startswith("h."):
            _, block, *middle, part = name.split(".")
            if (kind := NAMES.get(".".join(middle))) is not None and part in ("weight", "bias"):
                tensor = tensor.T if tensor.ndim == 2 else tensor
                yield f"blk.{block}.{kind}.{part}", np.ascontiguousarray(tensor, np.float32)
