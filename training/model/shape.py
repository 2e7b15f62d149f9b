"""The fields that define a DMPT, and what follows from them: tree, leaves, heads. Standard library only.

`training.model.config.DMPTConfig` is a Shape that transformers can load and save. A plain Shape gives the same answers
without importing torch, which takes seconds, so impossible sizes are refused at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import FieldError, InputError

ROOT = "root"  # the trunk's node name, and the only leaf's name when there are no splits
EMBEDDING, POSITIONS = "transformer.wte.weight", "transformer.wpe.weight"
GATE_SOFT, GATE_HARD, MAX_PROB = "gate_soft", "gate_hard", "max_prob"
RANDOM = "random"  # a control for evaluation: shows how much the gates contribute
PATH_MODES = (GATE_SOFT, GATE_HARD, MAX_PROB, RANDOM)  # besides `<leaf>_only`
# activation_function -> `approximate` of torch's gelu; both names of the tanh form are Transformers'
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
MOST_HEADS = 8  # the default never gives a model more heads than this, unless it has more leaves


@dataclass(frozen=True)
class Node:
    """One segment of blocks between two splits; nodes form a binary tree named by turns."""

    name: str
    start: int  # first block index (absolute)
    stop: int  # one past the last block index
    parent: str | None
    children: tuple[str, str] | None  # (left, right), or None for a leaf

    @property
    def prefix(self) -> str:
        """Prefix of the node's tensor names in the checkpoint."""
        return "transformer" if self.parent is None else f"paths.{self.name}"


def build_tree(splits: list[int], n_layer: int) -> dict[str, Node]:
    """Nodes by name, parents before children, left before right.

    >>> [n.name for n in build_tree([6], 12).values()]
    ['root', 'left', 'right']
    """
    bounds = [0, *splits, n_layer]
    if any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise InputError(
            f"splits {list(splits)} do not fit {n_layer} blocks: give increasing block indices from 1 to {n_layer - 1}"
        )
    nodes: dict[str, Node] = {}
    level: list[tuple[str, str | None]] = [(ROOT, None)]
    for depth, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        below: list[tuple[str, str | None]] = []
        for name, parent in level:
            children = None
            if depth < len(splits):
                stem = "" if name == ROOT else f"{name}_"
                children = (f"{stem}left", f"{stem}right")
                below += [(child, name) for child in children]
            nodes[name] = Node(name, start, stop, parent, children)
        level = below
    return nodes


def leaf_names(splits: list[int], n_layer: int) -> list[str]:
    """Leaf (= path) names, left to right. Raises InputError as build_tree."""
    return [name for name, node in build_tree(splits, n_layer).items() if node.children is None]


def even_allocation(leaves: list[str], n_heads: int) -> dict[str, list[int]]:
    """The default head allocation: `n_heads` heads divided evenly, in leaf order.

    >>> even_allocation(["left", "right"], 4)
    {'left': [0, 1], 'right': [2, 3]}
    """
    if n_heads < 1 or n_heads % len(leaves):
        raise FieldError(
            "{} heads do not divide evenly among {} leaves ({}): use a multiple of {}, or name the heads of each leaf "
            "with {head_allocation}",
            n_heads, len(leaves), ", ".join(leaves), len(leaves),
        )  # fmt: skip
    each = n_heads // len(leaves)
    return {leaf: list(range(i * each, (i + 1) * each)) for i, leaf in enumerate(leaves)}


class Shape:
    """GPT-2's fields plus splits, head allocation and gates; the defaults are GPT-2 small's.

    ``splits=[]`` with one tied head is plain GPT-2.
    """

    vocab_size: int = 50257
    n_positions: int = 1024  # the longest context, in tokens
    n_embd: int = 768
    n_layer: int = 12  # blocks on any root-to-leaf way
    n_head: int = 12  # attention heads (not vocabulary heads)
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    splits: list[int]  # block indices where every path forks in two
    head_allocation: dict[str, list[int]]  # leaf -> head ids, the anchor first
    gate_hidden: int = 256
    gate_temp: float = 1.2  # softens gates in gate_soft; hard choices do not depend on it
    head_gate_temp: float = 1.0
    head_topk: int | None = None  # heads mixed per token; None: all of the leaf
    fast_k: int | None = None  # candidates of the anchor; None: every head is scored fully
    tie_word_embeddings: bool = True  # heads.0 is transformer.wte
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Shape:
        """Build a torch-free Shape; unknown fields are ignored. Raises InputError as check()."""
        shape = Shape()
        for name in Shape.__annotations__.keys() & fields.keys():
            setattr(shape, name, fields[name])
        shape.splits = list(fields.get("splits", ()))
        if fields.get("head_allocation") is None:
            shape.head_allocation = even_allocation(shape.leaves, len(shape.leaves))
        shape.check()
        return shape

    @property
    def tree(self) -> dict[str, Node]:
        """Nodes by name, parents before children."""
        return build_tree(self.splits, self.n_layer)

    @property
    def leaves(self) -> list[str]:
        """Leaf (= path) names, left to right."""
        return leaf_names(self.splits, self.n_layer)

    @property
    def split_nodes(self) -> list[str]:
        """Nodes that hold a gate, parents first."""
        return [name for name, node in self.tree.items() if node.children is not None]

    @property
    def n_vocab_heads(self) -> int:
        return 1 + max(j for heads in self.head_allocation.values() for j in heads)

    @property
    def mlp_width(self) -> int:
        return self.n_inner or 4 * self.n_embd

    def head_name(self, j: int) -> str:
        """The checkpoint tensor that holds head j; a tied head 0 is the embedding."""
        return EMBEDDING if j == 0 and self.tie_word_embeddings else f"heads.{j}.weight"

    def ways(self) -> dict[str, list[tuple[str, int]]]:
        """For each leaf, the turns that lead to it: way()."""
        return {leaf: self.way(leaf) for leaf in self.leaves}

    def way(self, name: str) -> list[tuple[str, int]]:
        """The turns that lead to a node: (split node, 0 for left or 1 for right), root first."""
        tree = self.tree
        turns: list[tuple[str, int]] = []
        node = tree[name]
        while node.parent is not None:
            parent = tree[node.parent]
            assert parent.children is not None
            turns.insert(0, (parent.name, parent.children.index(node.name)))
            node = parent
        return turns

    def leaves_of_mode(self, mode: str) -> list[str] | None:
        """The leaves a path mode chooses among: None for all, for `<node>_only` those under the node."""
        if mode in PATH_MODES:
            return None
        known = {f"{name}_only": name for name, node in self.tree.items() if node.parent or not node.children}
        if mode not in known:
            raise InputError(f"unknown path mode '{mode}': choose one of {', '.join([*PATH_MODES, *known])}")
        name = known[mode]
        return [leaf for leaf in self.leaves if leaf == name or leaf.startswith(f"{name}_")]

    def touched_per_token(self, sizes: Mapping[str, int]) -> int:
        """How much of a model one decoding step reads, for the leaf that reads most.

        sizes: checkpoint tensor -> its size, in parameters or bytes; the result is in the same unit. A step reads the
        blocks and gates on the way to the leaf, its norm and head gate, one row each of the embedding and the
        positions, the whole anchor head, and fast_k rows of every other head of the leaf (all rows without fast-k).
        """

        def of_leaf(leaf: str, splits: list[str]) -> float:
            parts = ["transformer.h.", "transformer.ln_f.", f"head_gates.{leaf}.", f"paths.{leaf}."]
            parts += [f"{kind}.{name}." for name in splits for kind in ("paths", "gates")]
            anchor, *others = (sizes[self.head_name(j)] for j in self.head_allocation[leaf])
            rows = sizes[EMBEDDING] / self.vocab_size + sizes[POSITIONS] / self.n_positions
            heads = anchor + sum(others) * (self.fast_k or self.vocab_size) / self.vocab_size
            return rows + heads + sum(size for name, size in sizes.items() if name.startswith(tuple(parts)))

        return round(max(of_leaf(leaf, [name for name, _ in turns]) for leaf, turns in self.ways().items()))

    def check_exportable(self) -> None:
        """Raise InputError for a model that cannot be exported to a device."""
        if (width := self.n_embd // self.n_head) % 8:
            raise InputError(
                f"attention heads are {width} wide (n_embd {self.n_embd} / n_head {self.n_head}): ONNX Runtime needs a "
                "multiple of 8, so the model could not be exported"
            )

    def check(self) -> None:
        """Raise InputError naming the first invalid field."""
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.activation_function not in ACTIVATIONS:
            raise InputError(
                f"activation_function '{self.activation_function}' is not supported: it must be one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if set(self.head_allocation) != set(self.leaves):
            raise InputError(
                f"head_allocation names leaves {sorted(self.head_allocation)}, the tree has {sorted(self.leaves)}"
            )
        used: set[int] = set()
        for leaf, heads in self.head_allocation.items():
            if not heads or len(set(heads)) != len(heads) or any(type(j) is not int or j < 0 for j in heads):
                raise InputError(f"head_allocation of '{leaf}' must be distinct head ids from 0, not {heads}")
            used |= set(heads)
        if used != set(range(len(used))):
            raise InputError(f"head_allocation uses heads {sorted(used)}: ids must run from 0 without a gap")
        if self.fast_k is not None and not 1 <= self.fast_k <= self.vocab_size:
            raise InputError(f"fast_k {self.fast_k} must be from 1 to the vocabulary size {self.vocab_size}")
        most = max(len(heads) for heads in self.head_allocation.values())
        if self.head_topk is not None and not 1 <= self.head_topk <= most:
            raise InputError(f"head_topk {self.head_topk} must be from 1 to the heads of a leaf ({most})")
        if self.gate_temp <= 0 or self.head_gate_temp <= 0:
            raise InputError("gate_temp and head_gate_temp must be above 0")


# --- GPT-2 to DMPT ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewShape:
    """What a GPT-2 is to become."""

    splits: list[int] | None = None  # block indices of the forks; None: half depth; []: none, several heads on one path
    head_allocation: dict[str, list[int]] | None = None  # head ids of each leaf
    heads: int | None = None  # or so many in all, shared out evenly; None: 4 a leaf, at most 8
    fast_k: int | None = None
    head_topk: int | None = None
    gate_hidden: int = Shape.gate_hidden
    tie: bool | None = None  # heads.0 is the embedding; None: as it was


def init_fields(old: Shape, new: NewShape) -> dict[str, Any]:
    """The fields that training.model.init.init_from_gpt2 changes. Raises InputError as it does, and MemoryError for
    sizes that this machine cannot hold."""
    splits, head_allocation, gate_hidden = new.splits, new.head_allocation, new.gate_hidden
    if old.splits or old.n_vocab_heads != 1:
        raise InputError(
            f"this model already has splits {old.splits} and {old.n_vocab_heads} head(s): "
            "init starts from a GPT-2, or from a DMPT without splits and with one head"
        )
    if splits is None:
        if old.n_layer < 2:
            raise FieldError("a model of one block cannot be split: use {splits} none")
        splits = [old.n_layer // 2]
    if new.tie and not old.tie_word_embeddings:
        raise FieldError("this model's head is not tied to its embedding: leave {tie} out")
    if gate_hidden < 1:
        raise InputError(f"gate_hidden {gate_hidden} must be at least 1")
    _check_memory("heads", 0 if new.heads is None else new.heads, old.vocab_size * old.n_embd)
    _check_memory("gate_hidden", gate_hidden, old.n_embd)
    if head_allocation is None:
        leaves = leaf_names(splits, old.n_layer)
        head_allocation = even_allocation(leaves, default_heads(len(leaves)) if new.heads is None else new.heads)
    return {
        "splits": splits,
        "head_allocation": head_allocation,
        "gate_hidden": gate_hidden,
        "head_topk": new.head_topk,
        "fast_k": new.fast_k,
        "tie_word_embeddings": old.tie_word_embeddings if new.tie is None else new.tie,
    }


def check_init(old: Shape, new: NewShape) -> Shape:
    """The shape of the model that init_from_gpt2 would build. Raises as init_fields, and for fields that do not fit."""
    return Shape.of(vars(old) | init_fields(old, new))


def default_heads(n_leaves: int) -> int:
    """Four heads per leaf, but at most eight in all: each costs as much memory as the embedding.

    >>> [default_heads(n) for n in (1, 2, 4, 16)]
    [4, 8, 8, 16]
    """
    return max(n_leaves, min(MOST_HEADS, 4 * n_leaves))


def _check_memory(name: str, value: int, elements: int) -> None:
    """Raise MemoryError for more than this machine's memory: Linux would kill the process without a message."""
    needed = 4 * value * elements
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError(f"{name} {value} needs {needed / 1e9:.0f} GB")
