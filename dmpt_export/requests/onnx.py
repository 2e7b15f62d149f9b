"""Checkpoint -> checked ONNX folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpt_export.extras import require
from dmpt_export.onnx.exportable import WEB, ExportOptions, deployed
from dmpt_export.requests.quantize import Found as Quantizing
from dmpt_export.requests.quantize import QuantizeRequest
from dmpt_export.requests.sources import check_model, is_quantized
from training.errors import FieldError, OptionError
from training.progress import say, tell

if TYPE_CHECKING:
    import numpy as np


WEB_SCHEME = "int8-dynamic"  # its product is the only quantized one that does not unpack weights in WebAssembly
CALIBRATED, COUNTED = 4, 1000  # contexts of text read to calibrate a cache, and to count tokens


@dataclass(frozen=True)
class Found:
    """What check() read on its way."""

    ids: np.ndarray | None  # tokens to calibrate an int8 KV cache with
    counted: np.ndarray | None  # tokens whose most frequent ones draft heads choose among
    quantizing: Quantizing | None  # what the check of quantizing found


@dataclass(frozen=True)
class ExportRequest:
    checkpoint: str  # DMPT folder, quantized folder, or GPT-2 folder or hub id
    out: str  # folder
    layout: str = ExportOptions.layout  # native, or standard: for optimum, onnxruntime-genai and transformers.js
    target: str = ExportOptions.target  # cpu, cuda, or web, which quantizes a float checkpoint by WEB_SCHEME
    only_path: str | None = None  # a leaf, exported alone as a model with one path
    fast_k: int | None = None  # candidates of the anchor head; 0: none, every head in full; None: the checkpoint's
    head_topk: int | None = None  # heads mixed per token; 0: all of the path; None: the checkpoint's
    kv_cache: str = ExportOptions.kv_cache  # float or int8
    scheme: str | None = None  # quantize first, as QuantizeRequest with this and the next fields
    vocab_scheme: str | None = None  # of the embedding and the heads; None: what suits the scheme and the target
    block: int | None = None  # weights that share a scale; None: the scheme's own
    asymmetric: bool = False  # with a zero point for each block
    rules: tuple[str, ...] = ()  # PATTERN=SCHEME[:BLOCK][:asymmetric], the first that matches wins
    target_size: int | None = None  # bytes of the weights' file: a plan
    plan: str | None = None  # plan.json of an earlier plan
    calib: str | None = None  # text file for quantizing, and to calibrate an int8 KV cache; None: random tokens there
    draft_vocab: int | None = None  # tokens that draft heads choose among; 0: leave them out; None: 8192 or all
    draft_text: str | None = None  # text whose most frequent tokens these are; None: the lowest ids
    opset: int = ExportOptions.opset  # version of the standard operators
    atol: float | None = None  # largest allowed difference of a log-prob, in nats; None: the tolerance table's
    no_verify: bool = False  # publish without comparing with torch
    overwrite: bool = False  # an earlier result in `out` is replaced

    @property
    def options(self) -> ExportOptions:
        return ExportOptions(
            self.target,
            self.fast_k,
            self.head_topk,
            self.kv_cache,
            self.opset,
            self.draft_vocab,
            self.atol,
            self.layout,
        )

    @property
    def asks_to_quantize(self) -> bool:
        return bool(self.scheme or self.target_size is not None or self.plan)

    @cached_property
    def usual_scheme(self) -> str | None:
        """The scheme that the target gives a float checkpoint. Raises InputError as is_quantized."""
        if self.asks_to_quantize or self.target != WEB or is_quantized(self.checkpoint):
            return None
        return WEB_SCHEME

    @property
    def quantizes(self) -> bool:
        return self.asks_to_quantize or self.usual_scheme is not None

    def quantization(self, checkpoint: str, out: str | None) -> QuantizeRequest:
        """Quantizing `checkpoint` into `out`; None: only to check it."""
        scheme, vocabulary = self.scheme or self.usual_scheme, self.vocab_scheme
        if self.target == WEB and scheme == WEB_SCHEME:
            vocabulary = vocabulary or WEB_SCHEME
        calib = self.calib if self.asks_to_quantize else None  # else it is for the caches alone
        return QuantizeRequest(
            checkpoint, out, scheme, vocabulary, self.block, self.asymmetric, self.rules, calib,
            target_size=self.target_size, plan=self.plan, dry_run=out is None,
        )  # fmt: skip

    def check(self) -> Found:
        """Raise OptionError for fields that exclude each other, then InputError for unusable files."""
        if not self.asks_to_quantize and (self.block or self.asymmetric or self.rules or self.vocab_scheme):
            raise OptionError("{block}, {asymmetric}, {rules} and {vocab_scheme} need {scheme}")
        if self.only_path is not None and self.plan is not None:
            raise OptionError("{plan} is for a model with all its paths: leave it out with {only_path}")
        self.options.check(verified=not self.no_verify, calibrated=self.calib is not None and not self.asks_to_quantize)
        require("train", "cpu")
        from training.checkpoints.folder import float_folder
        from training.checkpoints.places import check_inputs, check_new

        check_new(Path(self.out), "onnx", self.overwrite)
        check_inputs(Path(self.out), self.checkpoint, self.calib, self.plan, self.draft_text)
        shape = deployed(check_model(self.checkpoint), self.options)
        if self.only_path is not None:
            shape.check_leaf(self.only_path)
        if self.draft_text is not None and not shape.next_tokens:
            raise FieldError("{draft_text} is for an export with draft heads: leave it out")
        found = None
        if self.quantizes:
            request = self.quantization(self.checkpoint, None)
            if self.only_path is None:
                found = request.check()
            else:  # the rules are for the cut model
                request.check_fields()
                request.check_schemes()
                float_folder(self.checkpoint)
        wanted = self.calib is not None and self.kv_cache == "int8"
        ids = first_ids(self.checkpoint, str(self.calib), CALIBRATED) if wanted else None
        counted = None if self.draft_text is None else first_ids(self.checkpoint, self.draft_text, COUNTED)
        return Found(ids, counted, found)

    def run(self, found: Found) -> dict[str, Any]:
        """Export, quantized and calibrated with what check() found; returns the manifest."""
        if found.quantizing is None:  # else quantizing says so
            say("loading PyTorch and ONNX")
        from training.checkpoints.atomic import scratch_folder
        from training.checkpoints.lock import working_in

        with working_in(self.out, "onnx", beside=True), scratch_folder(self.out) as place:
            checkpoint, quantizing = self.checkpoint, found.quantizing
            if self.only_path is not None:
                from quant.single_path import save_single_path

                checkpoint = str(Path(place) / self.only_path)
                save_single_path(self.checkpoint, self.only_path, Path(checkpoint))
            if self.quantizes:
                quantized = str(Path(place) / "quantized")
                request = self.quantization(checkpoint, quantized)
                request.run(quantizing or request.check())
                checkpoint = quantized
            return self.export(checkpoint, found)

    def export(self, checkpoint: str, found: Found) -> dict[str, Any]:
        from dmpt_export.onnx.export import export_onnx

        name = Path(self.checkpoint).resolve().name if Path(self.checkpoint).is_dir() else self.checkpoint
        if self.only_path is not None:
            name += f", only path {self.only_path}"
        manifest = export_onnx(
            checkpoint, self.out, self.options, verify=not self.no_verify, calibration=found.ids,
            counted=found.counted, name=name, say=say,
        )  # fmt: skip
        if self.target == WEB:
            warn_of_slow(manifest["quantization"]["tensors"])
        return manifest


def warn_of_slow(stored: dict[str, dict[str, Any]]) -> None:
    """Print a line if a browser would unpack matrices again for every token."""
    slow = sorted({form["scheme"] for form in stored.values()} - {WEB_SCHEME, "fp16"})
    if slow:
        tell(
            f"note: WebAssembly unpacks {', '.join(slow)} weights at every token, which takes several times as long as "
            f"{WEB_SCHEME} (or fp16, where that loses too much)"
        )


def first_ids(checkpoint: str, file: str, sequences: int) -> np.ndarray:
    """The first tokens of a text file, at most as many as fill the context so many times."""
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
    ids = first_tokens(Path(file), tokenizer, end_of_text_id(tokenizer, shape), sequences * shape.n_positions)
    if not len(ids):
        raise InputError(f"{file} has no text")
    return ids
