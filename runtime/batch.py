"""Decode several texts together, one token each per run.

Each prompt runs alone, in place in its row of the shared caches, and every node of the tree catches up. From then on
all rows run together, and every node runs for all of them. So no row lags behind, and nothing needs padding: each row
has its own length. (On the CPU the operator cannot attend over several new tokens of several texts at once.)

    keys and values   [rows, n_head, capacity, head_dim]
    row 0             prompt ======== step = = = =
    row 1             prompt === step = = = =
    row 2             prompt ============ step = = = =
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.cache import Caches, roomier
from runtime.errors import RequestError
from runtime.graph_io import DRAFTING
from runtime.manifest import PER_TENSOR
from runtime.request import check_count, check_ids
from runtime.sampling import is_whole
from runtime.saved_prompt import State
from runtime.sequence import Sequence
from runtime.session import Engine

Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]


class Batch:
    """Several texts as rows, for beam search and other loops over several texts. Use it from one thread at a time.

    >>> batch = model.batch(2)                                           # doctest: +SKIP
    >>> log_probs, routes = batch.feed([[5, 6, 7], [8]])                 # [2, vocab], [2]: after each row's last token
    >>> log_probs, routes = batch.step(log_probs.argmax(axis=1))         # one more token for each row
    >>> batch.reorder([1, 1, 0])                                         # rows may be moved, repeated and left out
    >>> batch.lengths
    array([2, 2, 4])

    Each row gives the same result as alone: equal routes, and log-probs equal up to the rounding of kernels that take
    several rows at once (fp32 1e-4).
    """

    def __init__(self, engine: Engine, rows: int, capacity: int = 0) -> None:
        """rows: number of texts, all empty. capacity: tokens to make room for; room doubles when needed.

        Raises SetupError for an onnxruntime that decodes several texts incorrectly, RequestError for several rows of an
        int8-dynamic model: its kernels quantize the activations of all rows with one scale, so that they would change
        each other.
        """
        engine.check_batches()
        if rows != 1 and engine.manifest.rounds_rows_together:
            raise RequestError(
                f"several texts at once would change each other with {PER_TENSOR} weights, whose kernels round the "
                "activations of all rows together: take one at a time, or export int8 weights"
            )
        self.engine = engine
        manifest = engine.manifest
        self.config = manifest.config
        self.lengths: Int64s = np.zeros(check_count("rows", rows), np.int64)  # tokens of each row
        self.caches = Caches(engine, rows, roomier(0, capacity, self.config.n_positions))
        self.pending = [f"pending.{node.name}" for node in manifest.tree if node.parent]
        self.no_rows = np.zeros(1, manifest.activation_dtype)  # an address for tensors without elements
        self.outputs, self.of_any_size = list(manifest.outputs), manifest.outputs_of_any_size
        self.binding = engine.binding()
        self.total = np.zeros((), np.int32)
        self.last = np.ones((), np.int64)
        self.every_node = np.ones((), np.bool_)
        self.inputs: dict[str, NDArray[np.generic]] = {}
        self.bound = False  # everything except the result's address
        self.log_probs_at = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def feed(self, prompts: Many[ArrayLike]) -> tuple[Float32s, Int64s]:
        """Append token ids to every row, one or more each; the numbers may differ.

        Returns log-probs of the next token, float32 [rows, vocab], and the leaf that each row's last token was
        routed to, int64 [rows], as indices into `manifest.leaves`. Both belong to the caller. Raises RequestError,
        before anything runs, for bad ids, a full context, or unless there is one prompt for each row.
        """
        self.check_rows(len(prompts), "prompts")
        vocab_size, context = self.config.vocab_size, self.config.n_positions
        checked = [check_ids(ids, vocab_size, context, int(self.lengths[row])) for row, ids in enumerate(prompts)]
        log_probs, routes = np.empty((len(self), vocab_size), np.float32), np.empty(len(self), np.int64)
        self.reserve(max(int(length) + len(ids) for length, ids in zip(self.lengths, checked, strict=True)))
        for row, ids in enumerate(checked):
            routes[row] = self.run_row(row, ids, log_probs[row])
        return log_probs, routes

    def run_row(self, row: int, ids: Int64s | list[int], log_probs: Float32s) -> int:
        """Append tokens to one row alone, unchecked: fills `log_probs` [vocab], returns the last token's leaf."""
        length = int(self.lengths[row])
        self.reserve(length + len(ids))
        sequence = Sequence(self.engine, caches=self.caches, row=row, length=length)
        leaf = sequence.run(ids, log_probs[None], every_node=True)[0]
        self.lengths[row] += len(ids)
        return int(leaf)

    def put(self, row: int, state: State) -> None:
        """Replace one row's text by one that every node has processed whole."""
        self.reserve(len(state.ids))
        self.caches.fill(row, state.caches)
        self.lengths[row] = len(state.ids)
        self.bound = self.bound and self.engine.device == "cpu"  # elsewhere the caches have moved

    def step(self, ids: ArrayLike) -> tuple[Float32s, Int64s]:
        """Append one token to every row, in one run: ids [rows]. Returns and raises as feed()."""
        tokens = check_ids(ids, self.config.vocab_size, sys.maxsize)
        self.check_rows(len(tokens), "token ids")
        if (longest := int(self.lengths.max())) >= self.config.n_positions:
            raise RequestError(f"row {self.lengths.argmax()} has {longest} tokens, its context is full")
        log_probs = np.empty((len(self), self.config.vocab_size), np.float32)
        return log_probs, self.run(tokens, log_probs)

    def run(self, ids: Int64s | list[int], log_probs: Float32s) -> Int64s:
        """step() without checks: fills `log_probs` [rows, vocab] (C order), returns routes."""
        total = int(self.lengths.max()) + 1
        self.reserve(total)
        if not self.bound:
            self.bind()
        if log_probs.ctypes.data != self.log_probs_at:
            self.log_probs_at = log_probs.ctypes.data
            place = (np.float32, (len(self), 1, self.config.vocab_size), self.log_probs_at)
            self.binding.bind_output("log_probs", "cpu", 0, *place)
        self.inputs["input_ids"][:, 0] = ids
        self.inputs["position_ids"][:, 0] = self.lengths
        self.inputs["seqlens_k"][:] = self.lengths
        self.total[()] = total
        if self.engine.device != "cpu":  # a GPU copies when binding
            self.bind_inputs()
        for name in self.of_any_size:
            self.binding.bind_output(name)
        self.engine.run(self.binding)
        self.lengths += 1
        return self.routes.copy()

    def reorder(self, index: ArrayLike) -> None:
        """Replace row i by row index[i]. Rows may be repeated and left out; their number becomes len(index).

        Beams that keep their row cost nothing, others a copy of their keys and values. Raises RequestError for an
        index that is empty or names a row that does not exist.
        """
        try:
            order = np.asarray(index)
        except ValueError:  # ragged lists
            order = np.empty(0)
        if order.ndim != 1 or order.dtype.kind not in "iu" or not len(order):
            raise RequestError("the new order of rows must be one flat list of row numbers")
        if order.min() < 0 or order.max() >= len(self):
            raise RequestError(f"the new order names row {order[(order < 0) | (order >= len(self))][0]} of {len(self)}")
        self.caches.reorder(order, int(self.lengths.max()))
        self.lengths = self.lengths[order]
        self.bound = False

    def resize(self, rows: int) -> None:
        """Keep the first `rows` texts, or add empty ones. Memory stays that of the most rows so far.

        Raises RequestError for more rows than that.
        """
        added = check_count("rows", rows, self.caches.rows) - len(self)
        if added:
            self.lengths = np.append(self.lengths[:rows], np.zeros(max(0, added), np.int64))
            self.bound = False

    def forget(self, row: int) -> None:
        """Empty one row, for another text. Raises RequestError for a row that does not exist."""
        if not (is_whole(row) and 0 <= row < len(self)):
            raise RequestError(f"there is no row {row!r}: rows are 0 to {len(self) - 1}")
        self.lengths[row] = 0

    # --- memory and binding -------------------------------------------------------------------

    def reserve(self, total: int) -> None:
        """Make room for `total` tokens in each row."""
        if total > self.caches.capacity:
            filled = dict.fromkeys(self.engine.manifest.nodes, int(self.lengths.max()))
            self.caches.grow(roomier(self.caches.capacity, total, self.config.n_positions), filled)
            self.bound = False

    def bind(self) -> None:
        """Bind everything except the result, for the current number of rows."""
        rows, width = len(self), self.config.n_embd
        self.bound, self.log_probs_at = True, 0
        self.routes = np.empty(rows, np.int64)
        self.inputs = {
            "input_ids": np.zeros((rows, 1), np.int64),
            "position_ids": np.zeros((rows, 1), np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "total_length": self.total,
            "last": self.last,
            **({"every_node": self.every_node} if self.pending else {}),
            **({DRAFTING: np.zeros((), np.bool_)} if self.engine.manifest.draft_tokens else {}),
        }
        self.bind_inputs()
        nothing = (self.no_rows.dtype.type, (rows, 0, width), self.no_rows.ctypes.data)
        for name in self.pending:
            self.binding.bind_input(name, "cpu", 0, *nothing)
        for name in self.outputs:  # outputs that nothing reads stay where the run puts them
            self.binding.bind_output(name)
        self.caches.bind(self.binding, 0, rows)
        self.binding.bind_output("routes", "cpu", 0, np.int64, (rows, 1), self.routes.ctypes.data)

    def bind_inputs(self) -> None:
        for name, value in self.inputs.items():
            self.binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)

    def check_rows(self, given: int, what: str) -> None:
        if given != len(self):
            raise RequestError(f"{given} {what} for {len(self)} rows: give one for each row")
