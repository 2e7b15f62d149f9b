"""Checkpoint -> checked ONNX folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpt_export.extras import require
from dmpt_export.onnx.exportable import ExportOptions, deployed
from dmpt_export.requests.sources import check_model
from training.progress import say

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ExportRequest:
    checkpoint: str  # DMPT folder, quantized folder, or GPT-2 folder or hub id
    out: str  # folder
    target: str = ExportOptions.target  # cpu or cuda
    fast_k: int | None = None  # candidates of the anchor head; 0: none, every head in full; None: the checkpoint's
    head_topk: int | None = None  # heads mixed per token; 0: all of the path; None: the checkpoint's
    kv_cache: str = ExportOptions.kv_cache  # float or int8
    calib: str | None = None  # text file to calibrate an int8 KV cache; None: random tokens
    opset: int = ExportOptions.opset  # version of the standard operators
    atol: float | None = None  # largest allowed difference of a log-prob, in nats; None: the tolerance table's
    no_verify: bool = False  # publish without comparing with torch

    @property
    def options(self) -> ExportOptions:
        return ExportOptions(self.target, self.fast_k, self.head_topk, self.kv_cache, self.opset, self.atol)

    def check(self) -> np.ndarray | None:
        """Raise OptionError for fields that exclude each other, then InputError for unusable files.

        Returns the token ids for calibration, if any.
        """
        self.options.check(verified=not self.no_verify, calibrated=self.calib is not None)
        require("train", "cpu")
        from training.checkpoints.places import check_inputs, check_replaceable

        check_replaceable(Path(self.out), "onnx")
        check_inputs(Path(self.out), self.checkpoint, self.calib)
        deployed(check_model(self.checkpoint), self.fast_k, self.head_topk)
        return calibration_ids(self.checkpoint, self.calib) if self.calib is not None else None

    def run(self, ids: np.ndarray | None) -> dict[str, Any]:
        """Export, calibrated with the ids that check() returned; returns the manifest."""
        say("loading PyTorch and ONNX")
        from dmpt_export.onnx.export import export_onnx

        return export_onnx(self.checkpoint, self.out, self.options, verify=not self.no_verify, calibration=ids, say=say)


def calibration_ids(checkpoint: str, file: str) -> np.ndarray:
    """The first tokens of a text file, as many as calibration reads."""
    from dmpt_export.onnx.kv_cache import SEQUENCES
    from training.checkpoints.files import resolve
    from training.checkpoints.folder import read_shape
    from training.errors import InputError
    from training.text.sources import check_source
    from training.text.tokenizer import load_tokenizer
    from training.text.windows import check_vocabulary, end_of_text_id, first_tokens

    check_source(file)  # before the tokenizer: a foreign folder's needs Transformers, which takes seconds
    folder = resolve(checkpoint)
    shape, tokenizer = read_shape(folder), load_tokenizer(folder)
    check_vocabulary(tokenizer, shape.vocab_size, folder)
    ids = first_tokens(Path(file), tokenizer, end_of_text_id(tokenizer, shape), SEQUENCES * shape.n_positions)
    if not len(ids):
        raise InputError(f"{file} has no text for calibration")
    return ids
