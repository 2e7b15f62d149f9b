"""The peer OpenVINO: a stateful model exported by optimum-intel, run by openvino itself.

It runs with its default settings: on processors with bf16 it computes in bf16 (also with float32 weights) and stores
keys and values as uint8. The exported graph computes the logits of every prompt token.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.adapters.loop import Stepwise

MODEL = "openvino_model.xml"
# int8: optimum-intel's default (a scale and a zero point per channel); int4: blocks of 32 as in this project, including
# head and embedding.
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4, "sym": True, "group_size": 32, "ratio": 1.0, "all_layers": True},
}


class OpenVino(Stepwise):
    """A loaded folder and a request whose state is reset between turns."""

    def __init__(self, path: str, threads: int | None) -> None:
        import openvino

        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(Path(path) / MODEL, "CPU", settings)
        self.request = compiled.create_infer_request()
        self.names = {name for value in compiled.inputs for name in value.get_names()}
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        self.context, self.vocab_size = config["n_positions"], config["vocab_size"]
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self.native_s, self.fed = 0.0, 0

    def reset(self) -> None:
        self.request.reset_state()
        self.fed = 0

    def rows(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits [S, V] of the ids fed to the sequence; valid until the next call."""
        first, self.fed = self.fed, self.fed + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.fed), np.int64),
            "position_ids": np.arange(first, self.fed, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        start = perf_counter()
        self.request.infer({name: value for name, value in inputs.items() if name in self.names}, share_inputs=True)
        self.native_s = (self.native_s or 0.0) + perf_counter() - start
        logits: NDArray[np.float32] = self.request.get_output_tensor(0).data[0]
        return logits

    def feed(self, ids: list[int]) -> NDArray[np.float32]:
        return self.rows(ids)[-1]

    def logits(self, ids: list[int], last: int) -> NDArray[np.float32]:
        self.reset()
        return self.rows(ids)[-last:]


def load(path: str, threads: int | None, device: str) -> OpenVino:
    return OpenVino(path, threads)


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Make an OpenVINO folder from a Hugging Face GPT-2 folder; scheme: int8 or int4, weights only."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantization = OVWeightQuantizationConfig(**SCHEMES[scheme])
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, stateful=True, quantization_config=quantization
    )
    model.save_pretrained(out)
    size = (Path(out) / MODEL).with_suffix(".bin").stat().st_size
    return {"touched_bytes": size - position_bytes(Path(out) / MODEL), "size_bytes": size}


def position_bytes(file: Path) -> int:
    """Bytes of the position embedding with scales and zero points, of which a step reads only one row."""
    layers = ElementTree.parse(file).iter("layer")
    found = [layer.find("data") for layer in layers if ".wpe.weight" in layer.attrib["name"]]
    return sum(int(data.get("size", 0)) for data in found if data is not None)
