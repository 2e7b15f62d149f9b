"""Run a graph of the standard layout as the programs that it is for do, for the check."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dmpt_export.check.float_kernels import read_graph
from dmpt_export.check.outcomes import Outcome, Reference, compare
from dmpt_export.graph.standard import KEEP_INPUT
from runtime.ort import import_onnxruntime
from runtime.proof import Tolerance

Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]


class StandardModel:
    """score() and sequence() of runtime.Model for such a graph, and batches with padding."""

    def __init__(self, path: Path) -> None:
        onnxruntime = import_onnxruntime()
        graph = read_graph(path)
        graph.graph.output.append(helper.make_tensor_value_info("routes", TensorProto.INT64, ["batch_size", None]))
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self.session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.counts = KEEP_INPUT in inputs
        self.caches = {name: value.shape for name, value in inputs.items() if name.startswith("past_key_values.")}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __enter__(self) -> StandardModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        del self.session

    def sequence(self, rows: int = 1) -> Texts:
        return Texts(self, rows)

    def score(self, ids: list[int]) -> tuple[Float32s, Int64s]:
        """(log-probs [S, V], routes [S]) of all positions of one text."""
        return self.sequence().feed(ids)


class Texts:
    """Texts that grow together, their caches copied at each step, as programs without shared buffers do it."""

    def __init__(self, model: StandardModel, rows: int) -> None:
        self.model = model
        self.mask = np.empty((rows, 0), np.int64)
        self.caches = {
            name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in model.caches.items()
        }

    def feed(self, ids: list[int], last: int = 0) -> tuple[Float32s, Int64s]:
        """Append to one text: (log-probs [N, V], routes [N]) of the `last` rows; 0: of all."""
        log_probs, routes = self.step(np.array([ids]), np.ones((1, len(ids)), np.int64))
        return log_probs[0, -last:], routes[0, -last:]

    def step(self, ids: Int64s, mask: Int64s, keep: int = 0) -> tuple[Float32s, Int64s]:
        """Append to all texts: ids and mask [B, S], 0 where padding -> (log-probs [B, N, V], routes [B, N])."""
        self.mask = np.concatenate([self.mask, mask], axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, **self.caches}
        if self.model.counts:
            inputs[KEEP_INPUT] = np.array(keep, np.int64)
        out = dict(zip(self.model.outputs, self.model.session.run(self.model.outputs, inputs), strict=True))
        self.caches = {name: out[name.replace("past_key_values", "present", 1)] for name in self.caches}
        return out["logits"], out["routes"]


def padded(ids: list[int], shorter: int, left: bool) -> tuple[Int64s, Int64s]:
    """A batch of the text and its first `shorter` tokens, padded on one side with its own tokens: ids, mask [2, S]."""
    missing = len(ids) - shorter
    texts = [[*ids[:missing], *ids[:shorter]] if left else [*ids[:shorter], *ids[:missing]], ids]
    mask = np.ones((2, len(ids)), np.int64)
    mask[0, slice(missing) if left else slice(shorter, None)] = 0
    return np.array(texts), mask


def compare_padded(
    model: StandardModel, ids: list[int], want: Reference, tolerance: Tolerance, how: str
) -> dict[str, Any]:
    """Two texts together, the shorter one padded on the left: their prompts, then single tokens, against torch."""
    texts, lengths = model.sequence(rows=2), prompt_lengths(ids)
    log_probs, routes = texts.step(*padded(ids[: lengths[1]], lengths[0], left=True))
    results = {}
    for row, got in enumerate(decode_together(texts, ids, lengths)):
        prompt = slice(-lengths[row], None)
        whole = Outcome(
            np.concatenate([log_probs[row, prompt], got.log_probs]), np.concatenate([routes[row, prompt], got.routes])
        )
        name, text = ("padded", f"{how}padded on the left") if row == 0 else ("batch", f"{how}decoded in a batch")
        results[name] = compare(want.part(0, len(whole.routes)), whole, tolerance, text)
    return results


def compare_others(
    folder: Path, manifest: dict[str, Any], ids: list[int], want: Reference, tolerance: Tolerance
) -> dict[str, Any]:
    """The same in the layout's other graphs, which give only the last row; padded on the right where the graph looks
    for it."""
    results: dict[str, dict[str, Any]] = {}
    lengths = prompt_lengths(ids)
    for name in (name for name in manifest["graphs"] if name != manifest["model"]):
        results[name] = {}
        with StandardModel(folder / name) as model:
            texts = model.sequence(rows=2)
            log_probs, routes = texts.step(*padded(ids[: lengths[1]], lengths[0], left=model.counts), keep=1)
            for row, got in enumerate(decode_together(texts, ids, lengths)):
                first = lengths[row] - 1
                whole = Outcome(
                    np.concatenate([log_probs[row], got.log_probs]), np.concatenate([routes[row], got.routes]), first
                )
                part = want.part(first, first + len(whole.routes))
                results[name]["padded" if row == 0 else "batch"] = compare(part, whole, tolerance, name)
    return results


def prompt_lengths(ids: list[int]) -> tuple[int, int]:
    """Lengths of the two prompts, parts of the same text. The other half is fed token by token: rounding differs so
    much from one position to the next that a few do not show its mean."""
    return max(1, len(ids) // 4), max(1, len(ids) // 2)


def decode_together(texts: Texts, ids: list[int], lengths: tuple[int, int]) -> list[Outcome]:
    """Feed both texts their next tokens, one by one: what each gave after its prompt."""
    runs = []
    for i in range(len(ids) - lengths[1]):
        log_probs, routes = texts.step(np.array([[ids[n + i]] for n in lengths]), np.ones((2, 1), np.int64), keep=1)
        runs.append((log_probs[:, -1], routes[:, -1]))
    log_probs, routes = (np.stack(part, axis=1) for part in zip(*runs, strict=True))
    return [Outcome(log_probs[row], routes[row], n) for row, n in enumerate(lengths)]
