"""Read checkpoints (.pt) of the original DMPT project.

Three kinds, distinguished by their tensor names: dual path, quad path, and one path with several heads. The original
stores only some of a model's settings beside the tensors, so sizes come from the tensors.
Names: https://github.com/songnianqian/-Dynamic-Multiple-Path-Transformer (MIT, S. Qian 2025).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoints.checkpoint import TIED_HEAD, Checkpoint, check_tensors
from training.checkpoints.files import EXPECTED, check_pt, first_line
from training.checkpoints.nanogpt import from_nanogpt
from training.checkpoints.tensors import as_float32
from training.errors import FieldError, InputError
from training.model.config import DMPTConfig
from training.model.shape import ROOT, leaf_names

SAFE_TORCH = (2, 10)  # earlier, files could run code despite weights_only: CVE-2025-32434, CVE-2026-24747
# module that holds blocks -> our node
BLOCKS = {
    "shared_layers": ROOT,
    "transformer.h": ROOT,
    "left_path": "left",
    "right_path": "right",
    "left_intermediate": "left",
    "right_intermediate": "right",
    "path_left_left": "left_left",
    "path_left_right": "left_right",
    "path_right_left": "right_left",
    "path_right_right": "right_right",
}
GATES = {"gate": ROOT, "gate_1": ROOT, "gate_2_left": "left", "gate_2_right": "right"}
SEPARATE_HEADS = {"left_lm_head": "left", "right_lm_head": "right"}  # quad: lm_head_{leaf}
LAYERS = {"fc1": 0, "fc2": 2, "net.0": 0, "net.2": 2}  # layers of a head gate: older and newer names
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")  # DataParallel, torch.compile
COUNTERS = re.compile(r"lm_head\.(usage|selection)_counts|.*\.attn\.(bias|masked_bias)")
NANOGPT = "model_args"  # only nanoGPT checkpoints have this key
GPT2_EOS = {50257: 50256}  # vocabulary size -> id of <|endoftext|>


def read_original(
    path: str | os.PathLike[str], head_allocation: dict[str, list[int]] | None = None, n_head: int | None = None
) -> tuple[Checkpoint, list[str]]:
    """Convert a checkpoint of the original project; returns it with notes for the user on what was inferred.

    head_allocation, n_head (attention heads): needed where the file lacks them and they cannot be inferred.
    No code in the file is run. Raises InputError for a file that is not a checkpoint, is damaged or holds more than
    tensors and plain values, and for tensors that cannot be mapped (all named at once).
    """
    path = Path(path)
    state, stored = load_pt(path)
    if NANOGPT in stored:
        return from_nanogpt(path, state, stored[NANOGPT])
    notes: list[str] = []
    try:
        config, ids = infer_config(state, stored, head_allocation, n_head, notes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, IndexError) as error:  # shapes or settings that no DMPT has
        raise InputError(f"{path} is not a checkpoint of the original project ({first_line(error)})") from error
    names = {name: our_name(name, config, ids) for name in state}
    unknown = sorted(name for name, new in names.items() if new is None)
    if unknown:
        raise InputError(f"{path} holds tensors that have no place in a DMPT: {', '.join(unknown)}")
    tensors = {new: as_float32(path, name, state[name]).contiguous() for name, new in names.items() if new}
    if torch.equal(tensors.get(TIED_HEAD, torch.empty(0)), tensors["transformer.wte.weight"]):
        config.tie_word_embeddings = True
        del tensors[TIED_HEAD]
        notes.append("head 0 equals the embedding: stored once")
    check_tensors(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    return Checkpoint(config, tensors, path.parent), notes


def load_pt(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, model_config) of a .pt file, read by torch's weights-only loader; counters and masks left out."""
    from transformers import GPT2Config

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_TORCH:
        raise InputError(
            f"torch {torch.__version__} has known vulnerabilities in reading .pt files: upgrade to 2.10 or later"
        )
    check_pt(path)
    try:
        with torch.serialization.safe_globals([GPT2Config]):  # the original may store its whole configuration
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling a hostile or damaged file may raise anything
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise InputError(
                f"{path} holds an object besides tensors ({blocked[1]}), which could run code and was not loaded: "
                "save only model_state_dict and model_config"
            ) from error
        raise InputError(f"{path} cannot be read ({first_line(error)}): copy it again") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint with model_state_dict")
    state = next((content[key] for key in ("model_state_dict", "state_dict", "model") if key in content), content)
    named = {
        WRAPPERS.sub("", name): tensor
        for name, tensor in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    tensors = {name: tensor for name, tensor in named.items() if not COUNTERS.fullmatch(name)}
    if not tensors:
        raise InputError(f"{path} has no tensors under model_state_dict: {EXPECTED}")
    stored = content.get("model_config") or {}
    settings = dict(stored if isinstance(stored, Mapping) else vars(stored))
    if isinstance(content.get(NANOGPT), Mapping):
        settings[NANOGPT] = content[NANOGPT]
    return tensors, settings


# --- names ------------------------------------------------------------------------------------------


def our_name(name: str, config: DMPTConfig, ids: Mapping[int, int]) -> str | None:
    """The contract's name of an original tensor; "" for a dropped tensor, None for an unknown one.

    ids: original head id -> ours; heads that no leaf uses are absent.
    """
    tree = config.tree
    if match := re.fullmatch(rf"({'|'.join(map(re.escape, BLOCKS))})\.(\d+)\.(.+)", name):
        node = tree.get(BLOCKS[match[1]])
        return None if node is None else f"{node.prefix}.h.{node.start + int(match[2])}.{match[3]}"
    if match := re.fullmatch(r"(?:transformer\.)?(wte|wpe)\.weight", name):
        return f"transformer.{match[1]}.weight"
    if match := re.fullmatch(r"(?:transformer\.)?ln_f(?:_(\w+))?\.(weight|bias)", name):
        node = tree.get(match[1] or ROOT)
        return None if node is None else f"{node.prefix}.ln_f.{match[2]}"
    head = _head_name(name, config, ids)
    return _gate_name(name, config) if head is None else head


def _head_name(name: str, config: DMPTConfig, ids: Mapping[int, int]) -> str | None:
    j: int | None = None
    if match := re.fullmatch(r"lm_head\.perceptrons\.(\d+)\.weight", name):
        if int(match[1]) not in ids:
            return ""
        j = ids[int(match[1])]
    elif (leaf := separate_leaf(name)) in config.leaves:
        j = config.leaves.index(leaf)
    return None if j is None else f"heads.{j}.weight"


def separate_leaf(name: str) -> str:
    """The leaf that owns this head tensor, in the variants without shared heads; "" for none."""
    match = re.fullmatch(r"(?:(\w+_lm_head)|lm_head_(\w+))\.weight", name)
    return "" if match is None else SEPARATE_HEADS.get(match[1] or "", match[2] or "")


def _gate_name(name: str, config: DMPTConfig) -> str | None:
    layers = "|".join(map(re.escape, LAYERS))
    if match := re.fullmatch(rf"(?:_heads_gate_by_path\.(\w+)|gate)\.({layers})\.(weight|bias)", name):
        leaf = match[1] or ROOT  # the variant with one path calls its head gate `gate`
        if leaf not in config.leaves:
            return None
        mixed = len(config.head_allocation[leaf]) > 1  # one head needs no gate
        return f"head_gates.{leaf}.{LAYERS[match[2]]}.{match[3]}" if mixed else ""
    if match := re.fullmatch(rf"({'|'.join(GATES)})\.([02])\.(weight|bias)", name):
        return f"gates.{GATES[match[1]]}.{match[2]}.{match[3]}" if GATES[match[1]] in config.split_nodes else None
    return None


# --- configuration ----------------------------------------------------------------------------------


def infer_config(
    state: Mapping[str, Tensor],
    stored: Mapping[str, Any],
    allocation: dict[str, list[int]] | None,
    n_head: int | None,
    notes: list[str],
) -> tuple[DMPTConfig, dict[int, int]]:
    """Our configuration, and original head id -> ours for the heads in use."""
    wte = next((state[name] for name in ("wte.weight", "transformer.wte.weight") if name in state), None)
    wpe = next((state[name] for name in ("wpe.weight", "transformer.wpe.weight") if name in state), None)
    if wte is None or wpe is None or wte.dim() != 2 or wpe.dim() != 2:
        raise InputError(f"has no embeddings (wte.weight, wpe.weight): {EXPECTED}")
    vocab_size, n_embd = wte.shape
    splits, n_layer = infer_splits(state)
    leaves = leaf_names(splits, n_layer)
    chosen = allocation or infer_allocation(state, stored, leaves, notes)
    ids = {old: new for new, old in enumerate(sorted({j for heads in chosen.values() for j in heads}))}
    unused = count(state, r"lm_head\.perceptrons\.(\d+)\.") - len(ids)
    if unused > 0:
        notes.append(f"{unused} heads belong to no leaf and were dropped")
    gate_hidden = next((len(state[name]) for name in state if re.search(r"gate.*\.(0|fc1|net\.0)\.bias$", name)), 256)
    inner = next((tensor.shape[-1] for name, tensor in state.items() if name.endswith(".mlp.c_fc.weight")), None)
    notes.append("gate_temp 1.0: the original stored its --gate_temp but never applied it")
    most = max(len(heads) for heads in chosen.values())
    head_topk = stored.get("head_fast_k") or stored.get("head_topk")
    config = DMPTConfig(
        vocab_size=vocab_size,
        n_positions=wpe.shape[0],
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head or infer_n_head(stored, n_embd, notes),
        n_inner=inner,
        layer_norm_epsilon=stored.get("layer_norm_epsilon", 1e-5),
        splits=splits,
        head_allocation={leaf: [ids[j] for j in heads] for leaf, heads in chosen.items()},
        gate_hidden=gate_hidden,
        gate_temp=1.0,
        head_gate_temp=stored.get("head_gate_temp", 1.0),
        head_topk=head_topk if type(head_topk) is int and 0 < head_topk < most else None,
        tie_word_embeddings=False,
        bos_token_id=stored.get("bos_token_id", GPT2_EOS.get(vocab_size)),
        eos_token_id=stored.get("eos_token_id", GPT2_EOS.get(vocab_size)),
    )
    return config, ids


def count(names: Iterable[str], pattern: str) -> int:
    """Number of distinct values of `pattern`'s group, matched at the start of the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def infer_splits(state: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """(splits, blocks on a root-to-leaf way), from the number of blocks in each module."""
    blocks = {module: count(state, rf"{re.escape(module)}\.(\d+)\.") for module in BLOCKS}
    trunk = blocks["shared_layers"] or blocks["transformer.h"]
    if not trunk:
        raise InputError(f"has no blocks (shared_layers.*): {EXPECTED}")
    middle, top = blocks["left_intermediate"], blocks["path_left_left"]
    if middle or top:
        return [trunk, trunk + middle], trunk + middle + top
    return ([trunk], trunk + blocks["left_path"]) if blocks["left_path"] else ([], trunk)


def infer_allocation(
    state: Mapping[str, Tensor], stored: Mapping[str, Any], leaves: list[str], notes: list[str]
) -> dict[str, list[int]]:
    """(Original) head ids of each leaf; head gates give their number, the file may give the ids."""
    if any(separate_leaf(name) for name in state):
        return {leaf: [i] for i, leaf in enumerate(leaves)}
    n_heads = count(state, r"lm_head\.perceptrons\.(\d+)\.")
    if not n_heads:
        raise InputError(f"has no vocabulary heads (lm_head.perceptrons.*): {EXPECTED}")
    if leaves == [ROOT]:
        return {ROOT: list(range(n_heads))}
    filed = stored.get("head_allocation")
    gated = any(name.startswith("_heads_gate_by_path.") for name in state)
    if not gated or stored.get("use_head_mixture") is False:
        notes.append("heads were not mixed: head 0 for the left half of the paths, head 1 for the right")
        return {leaf: [0 if leaf.startswith("left") else 1] for leaf in leaves}
    if isinstance(filed, Mapping) and set(filed) == set(leaves):
        return {leaf: list(filed[leaf]) for leaf in leaves}
    widths = {
        leaf: next((len(state[f"_heads_gate_by_path.{leaf}.{last}.bias"]) for last in ("fc2", "net.2")
                    if f"_heads_gate_by_path.{leaf}.{last}.bias" in state), 0)
        for leaf in leaves
    }  # fmt: skip
    if sum(widths.values()) != n_heads:
        raise FieldError(
            "the file does not say which of its {} heads belong to which leaf: give {head_allocation}, the JSON file "
            "it was trained with",
            n_heads,
        )
    allocation, first = {}, 0
    for leaf, width in widths.items():
        allocation[leaf] = list(range(first, first + width))
        first += width
    notes.append(f"head allocation inferred from the head gates, ids in order: {allocation}")
    return allocation


def infer_n_head(stored: Mapping[str, Any], n_embd: int, notes: list[str]) -> int:
    """Number of attention heads: as stored, or with GPT-2's 64 values each."""
    filed = stored.get("n_head")
    if type(filed) is int and filed > 0:
        return filed
    if n_embd % 64:
        raise FieldError("the file does not say how many attention heads its width of {} has: give {n_head}", n_embd)
    notes.append(f"{n_embd // 64} attention heads of 64, as in every GPT-2: the file does not say")
    return n_embd // 64
