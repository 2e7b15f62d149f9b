"""Checkpoint in, checked ONNX folder out (docs/design.md, Artefact)."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.assemble import OPSET, OPSETS, build
from dmpt_export.graph.versions import least_onnxruntime
from dmpt_export.onnx.exportable import deployed
from dmpt_export.onnx.kv_cache import INT8, KINDS, KV_FLOAT, calibrate
from dmpt_export.onnx.manifest import ACTIVATIONS, MODEL_FILE, describe, text_rules, write_manifest
from quant.checkpoint import load_weights
from quant.forms.weights import Weights, quantized
from runtime.manifest_file import MANIFEST_NAME, REPORT_NAME
from training.checkpoints.atomic import atomic_folder, check_replaceable
from training.checkpoints.checkpoint import copy_tokenizer, read_config
from training.checkpoints.files import resolve
from training.errors import InputError

DATA_FILE = f"{MODEL_FILE}.data"
EXTERNAL_THRESHOLD = 1024  # bytes; smaller tensors stay inside model.onnx


def export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    target: str = "cpu",
    fast_k: int | None = None,
    head_topk: int | None = None,
    verify: bool = True,
    kv_cache: str = KV_FLOAT,
    calibration: np.ndarray | None = None,
    opset: int = OPSET,
    atol: float | None = None,
    say: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Write the ONNX folder of a checkpoint and return its manifest.

    Args:
        source: DMPT folder, quantized folder, GPT-2 folder or hub id.
        out: folder to create; an earlier export there is replaced, anything else is refused.
        target: "cpu" (fp32 activations) or "cuda" (fp16).
        fast_k, head_topk: override the checkpoint's; 0 turns them off, None keeps them.
        verify: run the result and compare it with torch before publishing.
        kv_cache: "float" (the type of the activations), or "int8" (cpu): a quarter of the memory, and faster at
            long contexts, for a small loss.
        calibration: token ids of typical text to scale an int8 cache by; random ids where there are none.
        opset: version of the standard operators.
        atol: largest difference of a log-prob from torch's with float kernels, instead of the tolerance table's.
        say: told what begins, for it takes a while.

    Raises InputError (3) for an unusable source or option, ValidationError (4) when the exported model differs
    from the checkpoint beyond `dmpt_export.check.tolerances`; nothing is left behind then.
    """
    check_options(target, verify, kv_cache, calibration, opset, atol)
    check_replaceable(Path(out), "onnx")
    folder = resolve(source)
    config = deployed(read_config(folder), fast_k, head_topk)
    scales = calibrate(folder, config, calibration) if kv_cache == INT8 else None  # before weights are in memory
    say("reading the weights and building the graph")
    config, weights = load_weights(folder)
    config = deployed(config, fast_k, head_topk)
    if target == "cuda":
        check_cuda(weights)
    model = build(config, weights, ACTIVATIONS[target], scales, opset)
    with atomic_folder(Path(out), "onnx") as temporary:
        ir.save(model, temporary / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=EXTERNAL_THRESHOLD)
        copy_tokenizer(folder, temporary, config)
        if (folder / REPORT_NAME).is_file():  # so that a comparison can show what each tensor lost
            shutil.copyfile(folder / REPORT_NAME, temporary / REPORT_NAME)
        manifest = describe(config, weights, target, folder, kv_cache, opset)
        manifest["text"] = text_rules(config, temporary)
        manifest["requires"] = {"onnxruntime": least_onnxruntime(model)}
        (temporary / "README.md").write_text(readme(manifest), encoding="utf-8")
        write_manifest(manifest, temporary)
        del model, weights  # checking needs the memory
        gc.collect()  # nodes and values of the graph refer to each other
        if verify:
            from dmpt_export.check.verify import check_export

            say("comparing it with torch")
            manifest["parity"] = check_export(temporary, manifest, folder, config, atol)
            write_manifest(manifest, temporary)
    return manifest


def check_cuda(weights: Weights) -> None:
    """Raise InputError for weights that ONNX Runtime 1.32 has no CUDA kernel for."""
    for form in quantized(weights).values():
        if not form.has_cuda_kernel:
            raise InputError(
                f"{form.scheme} has no CUDA kernel in ONNX Runtime: quantize with --scheme int8 or int4 instead"
            )


def check_options(
    target: str, verify: bool, kv_cache: str, calibration: np.ndarray | None, opset: int, atol: float | None
) -> None:
    """Raise InputError for options that are impossible for any model."""
    if target not in ACTIVATIONS:
        raise InputError(f"unknown target '{target}': choose one of {', '.join(ACTIVATIONS)}")
    if kv_cache not in KINDS:
        raise InputError(f"unknown kv_cache '{kv_cache}': choose one of {', '.join(KINDS)}")
    if target == "cuda" and kv_cache == INT8:
        raise InputError("an int8 KV cache is for --target cpu: leave --kv-cache out")
    if calibration is not None and kv_cache != INT8:
        raise InputError("calibration is for an int8 KV cache: leave it out, or give kv_cache 'int8'")
    if opset not in OPSETS:
        raise InputError(f"opset {opset} cannot be used: give {OPSETS[0]} to {OPSETS[-1]}")
    if atol is not None and (target == "cuda" or not verify):
        raise InputError("atol is for the check of fp32 activations: leave it out for cuda or without a check")
    if atol is not None and not 0 < atol < math.inf:
        raise InputError(f"atol {atol} must be a number above 0")


def readme(manifest: dict[str, Any]) -> str:
    config, leaves = manifest["config"], ", ".join(manifest["leaves"])
    return f"""# {manifest["source"]["name"]}: ONNX

Exported by dmpt-export for {manifest["target"]}, weights {manifest["quantization"]["scheme"]}: \
{manifest["parameters"]["total"]:,} parameters, {manifest["parameters"]["touched_per_token"]:,} touched per token \
({manifest["bytes_touched_per_token"] / 1e6:.2f} MB),
context {config["n_positions"]} tokens, paths: {leaves}.

    pip install 'CHECKOUT[cpu]'    # the folder where dmpt-export was checked out
    dmpt-export run . "Once upon a time"

`{MANIFEST_NAME}` describes the graph's inputs and outputs, the node tree and how closely the exported model
was found to follow its checkpoint.
"""
