"""Export a checkpoint to a checked ONNX folder (docs/design.md, Artefact)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dmpt_export.graph.assemble import OPSETS, build
from dmpt_export.graph.versions import least_onnxruntime
from dmpt_export.onnx.exportable import LAYOUTS, STANDARD, WEB, ExportOptions, deployed
from dmpt_export.onnx.kv_cache import INT8, KINDS, calibrate
from dmpt_export.onnx.manifest import ACTIVATIONS, EXTERNAL_THRESHOLD, MODEL_FILE, describe, text_rules, write_manifest
from dmpt_export.onnx.memory import give_back_memory
from dmpt_export.onnx.report import copy_report
from dmpt_export.onnx.standard import SETTINGS, standard_fields, standard_readme, write_graphs, write_settings
from quant.checkpoint import load_weights
from quant.forms.weights import Weights, quantized
from runtime.files import check_data
from runtime.manifest_file import MANIFEST_NAME, SIDE_FILES
from training.checkpoints.atomic import atomic_folder
from training.checkpoints.card import CARD, LIBRARY, card_text, inherited, model_fields, scheme_tags, tags_of, title
from training.checkpoints.checkpoint import copy_tokenizer, read_config
from training.checkpoints.files import resolve
from training.checkpoints.places import check_replaceable
from training.errors import FieldError, InputError
from training.model.config import DMPTConfig
from training.model.fields import tokens

DATA_FILE = f"{MODEL_FILE}.data"
DRAFT_VOCABULARY = 8192  # tokens, a sixth of GPT-2's


def export_onnx(
    source: str | Path,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    verify: bool = True,
    calibration: np.ndarray | None = None,
    counted: np.ndarray | None = None,
    name: str | None = None,
    say: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Write the ONNX folder of a checkpoint and return its manifest.

    Args:
        source: DMPT folder, quantized folder, GPT-2 folder or hub id.
        out: folder to create; an earlier export there is replaced, anything else is refused.
        options: deployment options; None: the defaults of ExportOptions.
        verify: run the result and compare it with torch before publishing.
        calibration: token ids of typical text to calibrate an int8 cache; None: random ids.
        counted: token ids of typical text: draft heads choose among its most frequent ones; None: the lowest ids, which
            in a byte-level BPE are those of the most frequent strings.
        name: of the source in the manifest and the model card; None: its folder's.
        say: called with the name of each phase.

    Raises InputError (3) for an unusable source or option, ValidationError (4) when the exported model differs
    from the checkpoint beyond `dmpt_export.check.tolerances`; nothing is left behind then.
    """
    options = options or ExportOptions()
    target, kv_cache, opset = options.target, options.kv_cache, options.opset
    check_options(options)
    options.check(verify, calibration is not None)
    check_replaceable(Path(out), "onnx")
    folder = resolve(source)
    config = deployed(read_config(folder), options)
    scales = calibrate(folder, config, calibration) if kv_cache == INT8 else None  # before weights are in memory
    say("reading the weights and building the graph")
    config, weights = load_weights(folder)
    names = [*weights]
    config = deployed(config, options)
    if not config.next_tokens:
        weights = {key: weight for key, weight in weights.items() if not key.startswith("draft_heads.")}
    vocabulary = draft_vocabulary(config, options.draft_vocab, counted)
    if target == "cuda":
        check_cuda(weights)
    with atomic_folder(Path(out), "onnx") as temporary:
        standard = options.layout == STANDARD
        copy_tokenizer(folder, temporary, config)
        manifest = describe(config, weights, target, folder, kv_cache, opset)
        if standard:
            model = write_graphs(config, weights, temporary, opset, target == WEB)
            write_settings(config, weights, temporary)
            manifest |= standard_fields(config, weights)
        else:
            model = build(config, weights, ACTIVATIONS[target], scales, opset, vocabulary, untiled=target == WEB)
            save_graph(model, temporary)
        copy_report(folder, temporary, names)  # so that a comparison can show each tensor's damage
        if name is not None:
            manifest["source"]["name"] = name
        manifest["text"] = text_rules(config, temporary)
        if config.next_tokens:
            manifest["drafts"] = {"tokens": config.next_tokens, "vocabulary": len(vocabulary)}
        manifest["requires"] = {"onnxruntime": least_onnxruntime(model)}
        (temporary / CARD).write_text(card_of(manifest, inherited(folder), standard), encoding="utf-8")
        write_manifest(manifest, temporary)
        graphs, others = manifest.get("graphs", [MODEL_FILE]), SIDE_FILES | (SETTINGS if standard else set())
        check_data(temporary, [*graphs], manifest["files"], others)
        del model, weights  # checking needs the memory
        give_back_memory(temporary)
        if verify:
            from dmpt_export.check.verify import check_export

            say("comparing the export with torch")
            manifest["parity"] = check_export(temporary, manifest, folder, config, options.atol, vocabulary)
            write_manifest(manifest, temporary)
    return manifest


def save_graph(model: ir.Model, folder: Path) -> None:
    """Write the graph, and beside it the initializers of its main part that are not small.

    Those of branches stay inside the graph's file: onnxruntime-web (1.30) finds no data file for them.
    """
    held = [(value, value.const_value) for value in model.graph.initializers.values()]
    large = [(value, tensor) for value, tensor in held if tensor is not None and tensor.nbytes > EXTERNAL_THRESHOLD]
    if large:
        stored = ir.external_data.convert_tensors_to_external([tensor for _, tensor in large], folder, DATA_FILE)
        for (value, _), tensor in zip(large, stored, strict=True):
            value.const_value = tensor
    ir.save(model, folder / MODEL_FILE)


def draft_vocabulary(config: DMPTConfig, size: int | None, counted: np.ndarray | None) -> np.ndarray:
    """The token ids that draft heads choose among, ascending: int64 [size]. Ends of text are always among them."""
    size = min(DRAFT_VOCABULARY, config.vocab_size) if size is None else size
    ends = [end for end in tokens(config.eos_token_id) if end < config.vocab_size]
    if 0 < size < len(ends):
        raise FieldError("{draft_vocab} {} has no room for the {} ends of text", size, len(ends))
    counts = np.bincount([] if counted is None else counted, minlength=config.vocab_size).astype(float)
    counts[ends] = np.inf
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def check_cuda(weights: Weights) -> None:
    """Raise InputError for weights without a CUDA kernel in ONNX Runtime 1.32."""
    for form in quantized(weights).values():
        if not form.has_cuda_kernel:
            raise FieldError(
                "{} has no CUDA kernel in ONNX Runtime: quantize with {scheme} int8 or int4 instead", form.scheme
            )


def check_options(options: ExportOptions) -> None:
    """Raise InputError for unknown values."""
    if options.target not in ACTIVATIONS:
        raise InputError(f"unknown target '{options.target}': choose one of {', '.join(ACTIVATIONS)}")
    if options.layout not in LAYOUTS:
        raise InputError(f"unknown layout '{options.layout}': choose one of {', '.join(LAYOUTS)}")
    if options.kv_cache not in KINDS:
        raise InputError(f"unknown kv_cache '{options.kv_cache}': choose one of {', '.join(KINDS)}")
    if options.opset not in OPSETS:
        raise InputError(f"opset {options.opset} cannot be used: give {OPSETS[0]} to {OPSETS[-1]}")


def card_of(manifest: dict[str, Any], known: dict[str, Any], standard: bool) -> str:
    """The folder's README.md. known: what its source's card states of license and the like."""
    heads = 1 + max(head for own in manifest["head_allocation"].values() for head in own)
    tags = ["onnx", *tags_of(manifest["config"]["splits"], heads), *scheme_tags(manifest["quantization"]["scheme"])]
    named = manifest | {"source": {"name": title(manifest["source"]["name"])}}
    body = standard_readme(named) if standard else readme(named)
    return card_text(model_fields(tags, known, "onnx" if standard else LIBRARY), body)


def readme(manifest: dict[str, Any]) -> str:
    config, leaves = manifest["config"], ", ".join(manifest["leaves"])
    return f"""# {manifest["source"]["name"]}: ONNX

Exported by dmpt-export for {manifest["target"]}, weights {manifest["quantization"]["scheme"]}: \
{manifest["parameters"]["total"]:,} parameters, {manifest["parameters"]["touched_per_token"]:,} touched per token \
({manifest["bytes_touched_per_token"] / 1e6:.2f} MB),
context {config["n_positions"]} tokens, paths: {leaves}.

    pip install 'CHECKOUT[cpu]'    # the folder where dmpt-export was checked out
    dmpt-export run . "Once upon a time"

`{MANIFEST_NAME}` describes the graph's inputs and outputs, the node tree and the measured differences between the
exported model and its checkpoint.
"""
