"""Compare a GPT-2 folder, when first read, with Transformers, the library that defines it.

Compares this project's log-probs with those of Transformers' GPT2LMHeadModel, built from the same weights and from
config.json as the library reads it, and the ids of a fixed text with the folder's own tokenizer. Only fields known to
training.model.fields reach the library: some fields of a config.json can make it run code (CVE-2026-4372).

A folder that passed is remembered, in memory and in the cache folder, until one of its files changes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from training.checkpoints.files import MODEL_FILES, TOKENIZER_FILES, cache_folder, read_json
from training.checkpoints.folder import VERIFY
from training.errors import ValidationError
from training.model.fields import COMPARED
from training.model.gpt2 import Names

if TYPE_CHECKING:
    from training.model.generation import DMPTForCausalLM

TOKENS, SEED = 16, 3
# Largest difference of a log-prob, absolute and relative. With large weights, sums in a different order may differ by
# more in float32; the same arithmetic then agrees in float64.
LIMITS = ((torch.float32, 1e-4, 1e-5), (torch.float64, 1e-6, 1e-6))
PASSED: set[str] = set()


def verify_source(
    folder: Path, make: Callable[[], DMPTForCausalLM], tensors: Mapping[str, Tensor], names: Names
) -> None:
    """Compare, once, a GPT-2 folder's results between this project and Transformers.

    make: builds the folder's model; tensors: its weights by the contract's names; names: their names in its files.
    Raises ValidationError (exit code 4) naming what differs, where and by how much.
    """
    if not VERIFY.get():
        return
    key = fingerprint(folder)
    record = cache_folder() / "verified" / key
    if key in PASSED or record.is_file():
        return
    compare_log_probs(folder, make(), tensors, names)
    from training.text.verify_tokenizer import verify_tokenizer

    verify_tokenizer(folder)
    PASSED.add(key)
    with contextlib.suppress(OSError):  # on failure it is compared again next time
        record.parent.mkdir(parents=True, exist_ok=True)
        record.touch()


def fingerprint(folder: Path) -> str:
    """Hash of the small files' content, the size and time of the weights, and the library versions."""
    digest = hashlib.sha256(f"1 {version('dmpt-export')} {version('transformers')} {folder.resolve()}".encode())
    for pattern in (*MODEL_FILES, *TOKENIZER_FILES):
        for file in sorted(folder.glob(pattern)):
            found = file.stat()
            digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns} {found.st_ino}".encode())
            if file.suffix != ".safetensors":
                digest.update(file.read_bytes())
    return digest.hexdigest()


def compare_log_probs(folder: Path, model: DMPTForCausalLM, tensors: Mapping[str, Tensor], names: Names) -> None:
    """Raise ValidationError if a log-prob of a few tokens differs from Transformers'."""
    theirs = transformers_model(folder, model, tensors, names)
    size = min(TOKENS, model.config.n_positions)
    ids = torch.from_numpy(np.random.default_rng(SEED).integers(0, model.config.vocab_size, (1, size)))
    blocks = model.transformer.h.values()
    for kind, atol, rtol in LIMITS:
        theirs, model = theirs.to(kind), model.to(kind)
        with torch.inference_mode(), outputs_of(theirs.transformer.h) as want, outputs_of(blocks) as got:
            expected = theirs(ids).logits[0].to(kind).log_softmax(-1)
            found = model.log_probs(ids)[0]
        if torch.allclose(found.to(kind), expected, rtol=rtol, atol=atol, equal_nan=True):  # both may overflow
            return
    difference = (found - expected).abs()
    t, v = divmod(int(difference.nan_to_num(torch.inf).argmax()), expected.shape[-1])
    first = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if not close(a, b)), None)
    where = "the blocks agree" if first is None else f"block {first} is the first that differs"
    raise ValidationError(
        f"{folder}: this program's result differs from Transformers': the log-prob of token {v} after position "
        f"{t} is {float(found[t, v]):.6f} instead of {float(expected[t, v]):.6f} ({where}). Please report it; "
        "--no-verify skips this check"
    )


def close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-5 * a.abs().max()).all())


@contextlib.contextmanager
def outputs_of(blocks: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Collect the output of each block, in order."""
    out: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Any) -> None:
        out.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield out
    finally:
        for handle in handles:
            handle.remove()


def transformers_model(folder: Path, model: DMPTForCausalLM, tensors: Mapping[str, Tensor], names: Names) -> Any:
    """Transformers' GPT-2 of a folder with the same tensors, in eval mode. The library itself reads config.json."""
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = {name: value for name, value in read_json(folder / "config.json").items() if name in COMPARED}
    fields["tie_word_embeddings"] = (
        model.config.tie_word_embeddings
    )  # decided by the weights: see training.checkpoints.folder
    config = GPT2Config.from_dict(fields)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(config)
    unwrapped = Names("", names.stem or "transformer.")
    state = {unwrapped.file(name): tensor for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    missing, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    missing = [name for name in missing if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    if missing or unexpected:
        raise ValidationError(
            f"{folder}: Transformers' GPT-2 of its config.json has different tensors: "
            f"{', '.join([*missing, *unexpected][:8])}"
        )
    restore_buffers(theirs)
    return theirs.eval()


def restore_buffers(model: Any) -> None:
    """Create the causal masks that a model on torch's meta device lacks."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            size = buffer.shape[-1] if buffer.dim() else 0
            mask = torch.ones(size, size, dtype=torch.bool).tril().view(1, 1, size, size)
            owner.register_buffer(
                name.rpartition(".")[2], mask if buffer.dim() else torch.tensor(-1e4), persistent=False
            )
