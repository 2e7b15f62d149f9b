"""A folder in the standard layout, which optimum, onnxruntime-genai and transformers.js open.

    model.onnx                    optimum: log-probs of every row
    genai.onnx                    onnxruntime-genai: of each text's last token
    onnx/model[_SUFFIX].onnx      transformers.js: of as many as it asks for
    onnx/model[_SUFFIX].onnx_data the weights of all three
    config.json, generation_config.json, tokenizer_config.json, genai_config.json

The programs differ in which rows they want logits of. The graphs are small, and the weights are stored once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dmpt_export.graph.standard import ALL, KEEP, LAST, build_standard, cache_layers, input_specs, output_specs
from dmpt_export.onnx.manifest import EXTERNAL_THRESHOLD, MODEL_FILE, described
from dmpt_export.onnx.sizes import n_parameters, touched_per_token
from quant.forms.weights import Weights, quantized
from runtime.manifest_file import MANIFEST_NAME, STANDARD_FORMAT, TOKENIZER_NAME
from training.checkpoints.files import read_json
from training.model.config import DMPTConfig
from training.model.fields import tokens
from training.text.tokenizer import load_tokenizer

SETTINGS = {"config.json", "generation_config.json", "genai_config.json"}  # files that other programs read
GENAI, JAVASCRIPT = "genai.onnx", "onnx"
# transformers.js names its files by type; (bits up to, its word, suffix)
TYPES = [(6, "q4", "_q4"), (12, "q8", "_quantized"), (17, "fp16", "_fp16"), (33, "fp32", "")]


def graph_files(weights: Weights) -> dict[str, str]:
    """Each graph's path in the folder, and the rows that it computes log-probs of."""
    return {MODEL_FILE: ALL, GENAI: LAST, f"{JAVASCRIPT}/model{javascript_type(weights)[1]}.onnx": KEEP}


def javascript_type(weights: Weights) -> tuple[str, str]:
    """transformers.js' word for the type of the blocks' layers, and its suffix of file names."""
    layers = [form for form in quantized(weights).values() if form.transposed]
    bits = 32.0
    if layers:
        bits = 8 * sum(form.nbytes for form in layers) / sum(form.shape[0] * form.shape[1] for form in layers)
    return next((word, suffix) for most, word, suffix in TYPES if bits <= most or most == TYPES[-1][0])


def write_graphs(config: DMPTConfig, weights: Weights, folder: Path, opset: int, untiled: bool) -> ir.Model:
    """The three graphs, which share a data file; returns the first one written. untiled: see graph.blocks.Timeline."""
    *others, (first, rows) = graph_files(weights).items()
    path = folder / first
    path.parent.mkdir()
    model = build_standard(config, weights, rows, opset, untiled)
    data = f"{path.name}_data"
    ir.save(model, path, external_data=data, size_threshold_bytes=EXTERNAL_THRESHOLD)
    written = ir.load(path).graph.initializers
    for name, rows in others:
        other = build_standard(config, weights, rows, opset, untiled)
        for weight, initializer in other.graph.initializers.items():
            stored = written[weight].const_value if weight in written else None
            if isinstance(stored, ir.ExternalTensor):
                initializer.const_value = ir.ExternalTensor(
                    f"{JAVASCRIPT}/{data}", stored.offset, stored.length, stored.dtype,
                    shape=stored.shape, name=stored.name, base_dir=folder,
                )  # fmt: skip
        ir.save(other, folder / name)
    return model


def standard_fields(config: DMPTConfig, weights: Weights) -> dict[str, Any]:
    """What the manifest says differently: its format, by which our runtime knows the folder, the graphs, and what a
    step reads."""
    touched_parameters, touched_bytes = touched_per_token(config, weights, every_path=True)
    return {
        "format": STANDARD_FORMAT,
        "parameters": {"total": sum(map(n_parameters, weights.values())), "touched_per_token": touched_parameters},
        "bytes_touched_per_token": touched_bytes,
        "graphs": graph_files(weights),
        "inputs": [described(spec) for spec in input_specs(config, ALL)],
        "outputs": [described(spec) for spec in output_specs(config, ALL)],
    }


def write_settings(config: DMPTConfig, weights: Weights, folder: Path) -> None:
    """The files that tell each program what it opens; the tokenizer is already there."""
    layers = len(cache_layers(config))
    ends = tokens(config.eos_token_id)
    first = next(iter(ends), None)
    word, _ = javascript_type(weights)
    model = {
        # The name under which all three know the layout. n_layer counts caches: those of every path.
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_head")},
        "n_layer": layers,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "use_cache": True,
        "transformers.js_config": {"dtype": word, "use_external_data_format": True},
    }
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": first}
    write(folder / "config.json", model)
    write(folder / "generation_config.json", generation)
    write(folder / "genai_config.json", genai_config(config, layers, ends))
    if (folder / TOKENIZER_NAME).is_file():
        write(folder / "tokenizer_config.json", special_tokens(config, folder))


def special_tokens(config: DMPTConfig, folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what a batch needs: a token for padding, and the side where it goes."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    end = settings.get("eos_token")
    begin = None if config.bos_token_id is None else load_tokenizer(folder).id_to_token(config.bos_token_id)
    special = {"bos_token": begin or end, "pad_token": end, "unk_token": end}
    return {
        **settings,
        **{name: token for name, token in special.items() if token is not None},
        "model_max_length": config.n_positions,
        "padding_side": "left",
    }


def genai_config(config: DMPTConfig, layers: int, ends: list[int]) -> dict[str, Any]:
    """genai_config.json for a decoder that gives only the last token's log-probs."""
    end = ends[0] if len(ends) == 1 else ends
    first = ends[0] if ends else 0
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": first if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": end if ends else config.vocab_size,  # a required field: an id that never comes
            "pad_token_id": first,
            "context_length": config.n_positions,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "dmpt-export", "provider_options": []},
                "filename": GENAI,
                "head_size": config.n_embd // config.n_head,
                "hidden_size": config.n_embd,
                "num_attention_heads": config.n_head,
                "num_key_value_heads": config.n_head,
                "num_hidden_layers": layers,
                "inputs": {
                    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": config.n_positions, "do_sample": False, "num_beams": 1,
                   "past_present_share_buffer": True},
    }  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def cache_line(manifest: dict[str, Any]) -> str:
    """What keys and values of one text take; the programs hold two copies, or room for the whole context at once."""
    config = manifest["config"]
    layers = len([spec for spec in manifest["inputs"] if spec["name"].endswith(".key")])
    size = 2 * 4 * layers * config["n_embd"] * config["n_positions"]
    return f"keys and values of a full context: {layers} layers, {size / 1e6:.0f} MB of float32 for each text"


def standard_readme(manifest: dict[str, Any]) -> str:
    """README.md of the folder: five lines for each program."""
    config, leaves, line = manifest["config"], manifest["leaves"], cache_line(manifest)
    paths = (
        f"\nThese programs know no paths: each one ({', '.join(leaves)}) is computed for every token.\n"
        "dmpt-export's own runtime computes a path only when a token takes it: export without `--layout` for it.\n"
        if len(leaves) > 1
        else ""
    )
    return f"""# {manifest["source"]["name"]}: ONNX in the standard layout

Exported by dmpt-export, weights {manifest["quantization"]["scheme"]}, {manifest["parameters"]["total"]:,} parameters, \
context {config["n_positions"]} tokens.
{line[0].upper()}{line[1:]}.
{paths}
`logits` are log-probs of the deployed model. ONNX Runtime {manifest["requires"]["onnxruntime"]} or later.

optimum (`pip install 'optimum-onnx[onnxruntime]'`):

    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer
    tokenizer, model = AutoTokenizer.from_pretrained("."), ORTModelForCausalLM.from_pretrained(".")
    ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=40)
    print(tokenizer.decode(ids[0]))

onnxruntime-genai (`pip install onnxruntime-genai`; C, C#, Java and others open the folder likewise):

    import onnxruntime_genai as og
    model = og.Model("."); tokenizer = og.Tokenizer(model); generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(tokenizer.encode("Once upon a time"))
    while generator.token_count() < 50 and not generator.is_done(): generator.generate_next_token()
    print(tokenizer.decode(generator.get_sequence(0)))

transformers.js (`npm install @huggingface/transformers`), with this folder as ./model:

    import {{ pipeline, env }} from "@huggingface/transformers";
    env.localModelPath = "./";
    const generate = await pipeline("text-generation", "model");
    console.log(await generate("Once upon a time", {{ max_new_tokens: 40 }}));

`{MANIFEST_NAME}` lists the files and the measured differences between the exported model and its checkpoint.
"""
