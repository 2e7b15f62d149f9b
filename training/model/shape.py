"""The fields that define a DMPT, and what follows from them: tree, leaves, heads. Standard library only.

`training.model.config.DMPTConfig` is a Shape that transformers can load and save. A plain Shape gives the same answers
without importing torch, which takes seconds, so impossible sizes are refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import FieldError, InputError
from training.model.domains import Served, check_domains, leaves_under

ROOT = "root"  # the trunk's node name, and the only leaf's name when there are no splits
EMBEDDING, POSITIONS = "transformer.wte.weight", "transformer.wpe.weight"
GATE_SOFT, GATE_HARD, MAX_PROB = "gate_soft", "gate_hard", "max_prob"
RANDOM = "random"  # a control for evaluation: shows how much the gates contribute
PATH_MODES = (GATE_SOFT, GATE_HARD, MAX_PROB, RANDOM)  # besides `<leaf>_only`
# activation_function -> `approximate` of torch's gelu; both names of the tanh form are Transformers'
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
FULL, PROJECTED = "full", "projected"
HEAD_KINDS = (FULL, PROJECTED)


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
    head_kind: str = FULL  # or projected: heads besides the anchors are a matrix in front of their leaf's anchor
    head_rank: int | None = None  # rank of that matrix; None: whole, [n_embd, n_embd]
    shared_anchor: bool = False  # projected heads only: all leaves use head 0's matrix, so their anchors project too
    next_tokens: int = 0  # draft heads of each leaf: further tokens that they predict after the next one
    domains: dict[str, Served] | None = None  # domain of text -> what serves it: training.model.domains
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
        """The checkpoint tensor of a head that has a vocabulary matrix; a tied head 0 is the embedding."""
        return EMBEDDING if j == 0 and self.tie_word_embeddings else f"heads.{j}.weight"

    def head_prefix(self, j: int) -> str:
        """What the names of head j's tensors start with."""
        return EMBEDDING if j == 0 and self.tie_word_embeddings else f"heads.{j}."

    @property
    def projected_heads(self) -> list[int]:
        """Heads without a vocabulary matrix of their own. Head 0 always has one, and without shared_anchor every head
        that is the anchor of some leaf."""
        if self.head_kind != PROJECTED:
            return []
        anchors = {0} if self.shared_anchor else {0, *(heads[0] for heads in self.head_allocation.values())}
        return [j for j in range(self.n_vocab_heads) if j not in anchors]

    def matrix_of(self, leaf: str, j: int) -> int:
        """The head whose vocabulary matrix head j of a leaf multiplies: its own, or the one it projects in front of."""
        if j not in self.projected_heads:
            return j
        return 0 if self.shared_anchor else self.head_allocation[leaf][0]

    def projection_names(self, j: int) -> list[str]:
        """The checkpoint tensors of a projected head, in the order in which they multiply."""
        parts = [""] if self.head_rank is None else [".down", ".up"]
        return [f"heads.{j}.projection{part}.weight" for part in parts]

    def draft_name(self, leaf: str, i: int) -> str:
        """The checkpoint tensor of a leaf's i-th draft head, from 0."""
        return f"draft_heads.{leaf}.{i}.weight"

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

    def check_leaf(self, leaf: str) -> None:
        """Raise FieldError for a leaf that could not be exported alone."""
        if not self.splits:
            raise FieldError("{only_path} is for a model with several paths: this one has no splits")
        if leaf not in self.leaves:
            raise FieldError("{only_path} '{}': choose one of {}", leaf, ", ".join(self.leaves))

    def leaves_of_mode(self, mode: str) -> list[str] | None:
        """The leaves a path mode chooses among: None for all, for `<node>_only` those under the node."""
        if mode in PATH_MODES:
            return None
        known = {f"{name}_only": name for name, node in self.tree.items() if node.parent or not node.children}
        if mode not in known:
            raise InputError(f"unknown path mode '{mode}': choose one of {', '.join([*PATH_MODES, *known])}")
        name = known[mode]
        return leaves_under(name, self.leaves)

    def touched_per_token(self, sizes: Mapping[str, int], every_path: bool = False) -> int:
        """How much of a model one decoding step reads, for the leaf that reads most. every_path: a step runs the blocks
        of all nodes, as the standard layout does.

        sizes: checkpoint tensor -> its size, in parameters or bytes; the result is in the same unit. A step reads the
        blocks and gates on the way to the leaf, its norm, head gate and projections, one row each of the embedding and
        the positions, and the leaf's matrix; of the other heads' matrices fast_k rows. Without fast-k it reads a whole
        matrix for every head.
        """

        def of_leaf(leaf: str, splits: list[str]) -> float:
            parts = ["transformer.h.", "transformer.ln_f.", f"head_gates.{leaf}.", f"paths.{leaf}."]
            parts += [f"{kind}.{name}." for name in splits for kind in ("paths", "gates")]
            if every_path:
                parts += ["gates.", *(f"paths.{node}.h." for node in self.tree)]
            own = self.head_allocation[leaf]
            parts += [f"heads.{j}.projection" for j in own if j in self.projected_heads]
            matrices = [self.matrix_of(leaf, j) for j in own]
            anchor, *others = dict.fromkeys(matrices) if self.fast_k else matrices
            rows = sizes[EMBEDDING] / self.vocab_size + sizes[POSITIONS] / self.n_positions
            candidates = (self.fast_k or self.vocab_size) / self.vocab_size
            heads = sizes[self.head_name(anchor)] + candidates * sum(sizes[self.head_name(j)] for j in others)
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
        if self.shared_anchor:
            used.add(0)  # its matrix is everyone's, also where no leaf has head 0
        if used != set(range(len(used))):
            raise InputError(f"head_allocation uses heads {sorted(used)}: ids must run from 0 without a gap")
        if self.fast_k is not None and not 1 <= self.fast_k <= self.vocab_size:
            raise InputError(f"fast_k {self.fast_k} must be from 1 to the vocabulary size {self.vocab_size}")
        most = max(len(heads) for heads in self.head_allocation.values())
        if self.head_topk is not None and not 1 <= self.head_topk <= most:
            raise InputError(f"head_topk {self.head_topk} must be from 1 to the heads of a leaf ({most})")
        if self.gate_temp <= 0 or self.head_gate_temp <= 0:
            raise InputError("gate_temp and head_gate_temp must be above 0")
        self._check_small_heads()
        check_domains(self.domains or {}, self.head_allocation)

    def _check_small_heads(self) -> None:
        """check() of projected heads and draft heads."""
        if self.head_kind not in HEAD_KINDS:
            raise InputError(f"head_kind '{self.head_kind}' must be one of {', '.join(HEAD_KINDS)}")
        check_head_kind(self.head_kind, self.head_rank, self.shared_anchor)
        if self.head_rank is not None and not 1 <= self.head_rank <= self.n_embd:
            raise InputError(f"head_rank {self.head_rank} must be from 1 to n_embd ({self.n_embd})")
        if not 0 <= self.next_tokens < self.n_positions:
            raise FieldError(
                "{next_tokens} {} must be from 0 to {}, below the context", self.next_tokens, self.n_positions - 1
            )


def check_head_kind(kind: str, rank: int | None, shared: bool | None) -> None:
    """Raise FieldError for fields that only projected heads have."""
    if kind != PROJECTED and (rank is not None or shared):
        raise FieldError("{head_rank} and {shared_anchor} need {head_kind} projected")
