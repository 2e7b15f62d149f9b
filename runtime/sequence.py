"""One text: its caches, and exact hard routing by lazy catch-up.

Every node of the tree has its own keys and values and may lag behind its parent: its caches hold `done[node]` tokens.
A run passes each node the rows of its parent that it has not processed (pending). The graph runs only the nodes that
the wanted positions are routed through, and these catch up on all their pending rows
(docs/design.md, Routing and catch-up).

    tokens      0 ......................... length
    root        ==============================      done: all, always; its output rows are kept
    left        ==================------------      pending rows of the root: done[left] to done[root]
    right       ==============================
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.cache import Caches, roomier
from runtime.errors import ModelError, RequestError
from runtime.graph_io import DRAFTING, DRAFTS, HEAD_LOG_WEIGHTS
from runtime.lookup import MOST_SPECULATED
from runtime.manifest import ROOT, Node
from runtime.request import check_count, check_ids
from runtime.saved_prompt import State, lags, read_state, write_state
from runtime.session import Engine

# Tokens of a prompt that run together. A prompt of 512 (GPT-2 small, int8, AVX-512) takes 0.96 of a single run's time,
# with an int8 cache 0.84, and less memory.
PIECE = 128
FEW = 1 + MOST_SPECULATED  # tokens in a step, at most; a longer run needs memory that steps do not


class Sequence:
    """Feeds tokens to a model and keeps the state of one text. Use it from one thread at a time."""

    def __init__(
        self, engine: Engine, capacity: int = 0, caches: Caches | None = None, row: int = 0, length: int = 0
    ) -> None:
        """capacity: tokens to make room for; room doubles when needed, up to the context.

        caches, row, length: instead of starting empty, continue one row of shared caches, which do not grow, after the
        `length` tokens that every node has there.
        """
        self.engine = engine
        manifest = engine.manifest
        self.config = manifest.config
        self.nodes: list[Node] = list(manifest.tree)
        self.children = [(f"pending.{node.name}", node.name, node.parent) for node in self.nodes if node.parent]
        self.splits = [node.name for node in self.nodes if node.children]
        self.ways = [manifest.way(leaf) for leaf in manifest.leaves]
        self.done = dict.fromkeys(manifest.nodes, length)
        self.dtype = np.dtype(manifest.activation_dtype)
        self.stride = self.config.n_embd * self.dtype.itemsize  # bytes of one row

        self.binding = engine.binding()
        self.of_any_size = manifest.outputs_of_any_size
        self.output_index = {name: i for i, name in enumerate(manifest.outputs)}
        self.fed = np.zeros(self.config.n_positions, np.int64)  # all tokens; those that a caller's caches had are 0
        self.ids = np.zeros(self.config.n_positions, np.int64)  # of a run
        self.positions = np.zeros(self.config.n_positions, np.int64)
        self.seqlens = np.zeros(1, np.int32)
        self.total = np.zeros((), np.int32)
        self.last = np.zeros((), np.int64)
        self.every_node = np.zeros((), np.bool_)
        self.drafting = np.zeros((), np.bool_)
        self.scalars: dict[str, NDArray[Any]] = {"seqlens_k": self.seqlens, "total_length": self.total}
        self.scalars |= {"last": self.last, **({"every_node": self.every_node} if self.splits else {})}
        self.scalars |= {DRAFTING: self.drafting} if manifest.draft_tokens else {}
        self.routes = np.zeros(0, np.int64)
        self.caches = caches or Caches(engine)
        self.row = row
        self.capacity = 0  # of the row buffers; the caches have the same
        self.rows: dict[str, NDArray[Any]] = {}  # split node -> its output rows for tokens [0, done)
        self.rows_at: dict[str, int] = {}  # address of each
        self.every_position = np.arange(0)
        self.bound: tuple[int, int, int] | None = None  # tokens, last, address of log_probs
        self.nothing_pending: set[str] = set()  # nodes bound to no rows
        self.reserve(caches.capacity if caches else min(capacity, self.config.n_positions))

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self.done[ROOT]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Ids of the tokens fed so far, [length]."""
        return self.fed[: self.length].copy()

    def reset(self) -> None:
        """Forget all tokens; the memory is kept for the next text."""
        self.rewind(0)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens. Cache entries of the others are overwritten later."""
        if length < 0:
            raise RequestError(f"length {length} must be a whole number, 0 or above")
        if length < self.length:
            self.done = {name: min(done, length) for name, done in self.done.items()}

    def feed(
        self, ids: ArrayLike, last: int = 1, every_path: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Append tokens and predict the next token after each of the last `last` of them. every_path: all paths read
        them now, so that none has to catch up later; for a text that is saved and continued many times.

        Returns log-probs of the next token, float32 [last, vocab], and the leaf each position was routed to,
        int64 [last], as indices into `manifest.leaves`. Both belong to the caller. Raises RequestError for bad ids,
        a full context, or `last` outside 1..len(ids).
        """
        tokens = check_ids(ids, self.config.vocab_size, self.config.n_positions, self.length)
        log_probs = np.empty((check_count("last", last, len(tokens)), self.config.vocab_size), np.float32)
        return log_probs, self.run(tokens, log_probs, every_path)

    def run(
        self,
        ids: NDArray[np.int64] | list[int],
        log_probs: NDArray[np.float32],
        every_node: bool = False,
        tidy: bool = False,
        drafting: bool = False,
    ) -> NDArray[np.int64]:
        """feed() without checks, for speed: fills `log_probs` [last, vocab] (C order), returns routes.

        every_node: let all nodes catch up, also those that no position is routed to, so that nothing is pending.
        tidy: free the memory that the run needed, as always after more than FEW tokens.
        drafting: let draft heads run; drafts() has their tokens.
        """
        if len(ids) - PIECE >= len(log_probs) and not self.splits and self.engine.device == "cpu":
            return self._run_in_pieces(ids, log_probs, tidy, drafting)
        size, start = len(ids), self.length
        total = start + size
        self.reserve(total)
        self.ids[:size] = self.fed[start:total] = ids
        self.positions[:size] = self.every_position[start:total]
        self.seqlens[0] = total - 1
        self.total[()] = total
        self.every_node[()] = every_node
        self.drafting[()] = drafting
        self.bind_call(size, log_probs)
        self.bind_pending()
        self.bind_rows(start, size)
        self.engine.run(self.binding, tidy=tidy or size > FEW)
        self.advance(total, every_node)
        return self.routes.copy()

    def _run_in_pieces(
        self, ids: NDArray[np.int64] | list[int], log_probs: NDArray[np.float32], tidy: bool, drafting: bool
    ) -> NDArray[np.int64]:
        """run() for a long prompt, by PIECE tokens; whole or not at all.

        With splits a prompt is not cut: each piece would run the path of its last token.
        """
        before = self.length
        self.reserve(before + len(ids))
        try:
            while len(ids) - PIECE >= len(log_probs):
                self.run(ids[:PIECE], log_probs[:1])
                ids = ids[PIECE:]
            return self.run(ids, log_probs, tidy=tidy, drafting=drafting)
        except BaseException:
            self.rewind(before)
            raise

    def head_weights(self) -> NDArray[np.float32] | None:
        """Head weights of each wanted position of the last run: [last, heads], by head number.

        0 for heads of other leaves, 1 for a leaf's only head. None where the export does not output them.
        """
        manifest, values = self.engine.manifest, self.binding.get_outputs_as_ortvaluevector()
        if not manifest.tells_head_weights:
            return None
        out = np.zeros((len(self.routes), 1 + max(max(own) for own in manifest.head_allocation.values())), np.float32)
        for i, leaf in enumerate(manifest.leaves):
            heads, mine = np.array(manifest.head_allocation[leaf]), np.flatnonzero(self.routes == i)
            if len(heads) == 1:
                out[mine, heads[0]] = 1
            else:
                log_weights = values[self.output_index[f"{HEAD_LOG_WEIGHTS}.{leaf}"]].numpy()
                out[np.ix_(mine, heads)] = np.exp(log_weights)
        return out

    def drafts(self) -> NDArray[np.int64]:
        """What draft heads predict after the next token of each wanted position of the last run: [last, draft_tokens].
        Empty unless it was drafting."""
        drafts: NDArray[np.int64] = self.binding.get_outputs_as_ortvaluevector()[self.output_index[DRAFTS]].numpy()[0]
        return drafts

    # --- copies and files ---------------------------------------------------------------------

    def copy(self, capacity: int = 0) -> Sequence:
        """The same text in memory of its own, with room for `capacity` tokens. Nodes that lag behind still do."""
        copy = Sequence(self.engine, max(capacity, self.length))
        copy.restore(self.state())
        return copy

    def save(self, path: str | PathLike[str]) -> None:
        """Write the text and its caches to a file, in one step; runtime.load_prompt reads it.

        Raises RequestError for an empty text, or where anything but a saved prompt would be replaced; OSError.
        """
        if self.length == 0:
            raise RequestError("there are no tokens to save: feed some first")
        write_state(path, self.state(), self.engine.manifest)

    @classmethod
    def load(cls, engine: Engine, path: str | PathLike[str]) -> Sequence:
        """The text that save() wrote with the same export. Raises RequestError, see read_state()."""
        state = read_state(path, engine.manifest)
        sequence = cls(engine, len(state.ids))
        sequence.restore(state)
        return sequence

    def state(self) -> State:
        """Everything that depends on the tokens. Its arrays are views: the next run may change them."""
        done, node_of = self.done, self.caches.node_of
        rows = {s: self.rows[s][done[s] - lag : done[s]] for s, lag in lags(self.engine.manifest, done).items()}
        caches = {name: b.host()[self.row, :, : done[node_of[name]]] for name, b in self.caches.buffers.items()}
        return State(self.tokens, dict(done), rows, caches)

    def restore(self, state: State) -> None:
        """Replace the text. Rows that every child has processed are missing from a state, and are never needed."""
        self.reset()
        self.reserve(len(state.ids))
        self.done = dict(state.done)
        self.fed[: self.length] = state.ids
        for split, rows in state.rows.items():
            self.rows[split][self.done[split] - len(rows) : self.done[split]] = rows
        self.caches.fill(self.row, state.caches)
        self.bind_all()

    # --- memory -------------------------------------------------------------------------------

    def reserve(self, total: int) -> None:
        """Make room for `total` tokens: caches and row buffers double, up to the context, and keep their content."""
        if total <= self.capacity:
            return
        self.capacity = roomier(self.capacity, total, self.config.n_positions)
        self.every_position = np.arange(self.capacity)
        if self.caches.capacity < self.capacity:
            self.caches.grow(self.capacity, self.done)
        for split in self.splits:
            rows = np.zeros((self.capacity, self.config.n_embd), self.dtype)
            if split in self.rows:
                rows[: self.done[split]] = self.rows[split][: self.done[split]]
            self.rows[split] = rows
        self.rows_at = {split: rows.ctypes.data for split, rows in self.rows.items()}
        self.bind_all()

    # --- binding: only what changed since the last run ----------------------------------------

    def bind_all(self) -> None:
        """Bind the caches and drop all other bindings. From here on the outputs are in the manifest's order."""
        self.bound, self.nothing_pending = None, set()
        for name in self.engine.manifest.outputs:
            self.binding.bind_output(name)
        self.caches.bind(self.binding, self.row, 1)

    def bind_call(self, size: int, log_probs: NDArray[np.float32]) -> None:
        """Bind what every call needs. On the CPU the graph reads these arrays in place; a GPU copies when binding."""
        call = (size, len(log_probs), log_probs.ctypes.data)
        if call == self.bound and self.engine.device == "cpu":
            return
        self.bound = call
        self.last[()] = len(log_probs)
        if len(self.routes) != len(log_probs):
            self.routes = np.empty(len(log_probs), np.int64)
        for name, value in (("input_ids", self.ids[:size]), ("position_ids", self.positions[:size])):
            self.binding.bind_input(name, "cpu", 0, np.int64, (1, size), value.ctypes.data)
        for name, scalar in self.scalars.items():
            self.binding.bind_input(name, "cpu", 0, scalar.dtype.type, scalar.shape, scalar.ctypes.data)
        self.binding.bind_output("log_probs", "cpu", 0, np.float32, (1, *log_probs.shape), log_probs.ctypes.data)
        self.binding.bind_output("routes", "cpu", 0, np.int64, (1, len(self.routes)), self.routes.ctypes.data)

    def bind_pending(self) -> None:
        """Bind each node's pending rows: a slice of its parent's row buffer, without a copy."""
        for name, child, parent in self.children:
            first, count = self.done[child], self.done[parent] - self.done[child]
            if count == 0 and child in self.nothing_pending:
                continue
            (self.nothing_pending.discard if count else self.nothing_pending.add)(child)
            address = self.rows_at[parent] + (first * self.stride if count else 0)
            self.binding.bind_input(name, "cpu", 0, self.dtype.type, (1, count, self.config.n_embd), address)

    def bind_rows(self, start: int, size: int) -> None:
        """Bind outputs whose size changes: the root's output rows directly into its buffer, others anywhere.

        Whether an inner node runs, and so how many rows it returns, is known only after the run.
        """
        for split in self.splits:
            if split == ROOT:
                place = ((1, size, self.config.n_embd), self.rows_at[ROOT] + start * self.stride)
                self.binding.bind_output(f"rows.{ROOT}", "cpu", 0, self.dtype.type, *place)
            else:
                self.binding.bind_output(f"rows.{split}")
        for name in self.of_any_size:
            self.binding.bind_output(name)

    # --- afterwards ---------------------------------------------------------------------------

    def advance(self, total: int, every_node: bool) -> None:
        """Record which nodes ran: those on the way to a chosen leaf, or all. Keep the rows of the split nodes."""
        taken = self.routes.tolist() if len(self.routes) == 1 else np.unique(self.routes).tolist()
        on_way = dict.fromkeys(name for leaf in taken for name in self.ways[leaf])
        for name in self.done if every_node else on_way:
            if name in self.rows and name != ROOT:
                self.keep_rows(name, total)
            self.done[name] = total

    def keep_rows(self, split: str, total: int) -> None:
        """Copy the rows that an inner node returned, for tokens [done, total), into its buffer."""
        values = self.binding.get_outputs_as_ortvaluevector()
        rows = values[self.output_index[f"rows.{split}"]].numpy()
        room = self.rows[split][self.done[split] : total]
        if rows.shape != (1, *room.shape):
            raise ModelError(f"rows.{split} has shape {list(rows.shape)}, expected {[1, *room.shape]}: export it again")
        room[:] = rows[0]
