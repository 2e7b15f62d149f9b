"""The peer optimum-onnx: its GPT-2 export run by ORTModelForCausalLM, in float32 or its dynamic int8."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.adapters.loop import Stepwise
from runtime.ort import import_onnxruntime


class Optimum(Stepwise):
    """A loaded folder and its growing cache. Steps call forward(), without generate()'s loop."""

    def __init__(self, path: str, threads: int | None) -> None:
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = import_onnxruntime().SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
            torch.set_num_threads(threads)
        self.torch, self.past, self.seen = torch, None, 0
        self.model = ORTModelForCausalLM.from_pretrained(
            path, file_name=graph(Path(path)).name, session_options=options
        )
        self.context, self.vocab_size = self.model.config.n_positions, self.model.config.vocab_size
        self.threads = int(torch.get_num_threads())

    def reset(self) -> None:
        self.past, self.seen = None, 0

    def rows(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits [S, V] of the ids fed to the sequence."""
        torch, first = self.torch, self.seen
        self.seen += len(ids)
        out = self.model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, self.seen, dtype=torch.int64),
            position_ids=torch.arange(first, self.seen)[None],
            past_key_values=self.past,
            use_cache=True,
        )
        self.past = out.past_key_values
        found: NDArray[np.float32] = out.logits[0].numpy()
        return found

    def feed(self, ids: list[int]) -> NDArray[np.float32]:
        return self.rows(ids)[-1]

    def logits(self, ids: list[int], last: int) -> NDArray[np.float32]:
        self.reset()
        return self.rows(ids)[-last:]


def load(path: str, threads: int | None, device: str) -> Optimum:
    return Optimum(path, threads)


def graph(folder: Path) -> Path:
    quantized = folder / "model_quantized.onnx"
    return quantized if quantized.is_file() else folder / "model.onnx"


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """Make an ONNX folder from a Hugging Face GPT-2 folder; scheme: fp32, or int8 by optimum's dynamic quantizer."""
    from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForCausalLM, ORTQuantizer

    model = ORTModelForCausalLM.from_pretrained(source, export=True)
    model.save_pretrained(out)
    if scheme == "int8":
        config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer = ORTQuantizer.from_pretrained(out, file_name="model.onnx")
        quantizer.quantize(save_dir=out, quantization_config=config)
        for file in Path(out).glob("model.onnx*"):
            file.unlink()
    size = sum(file.stat().st_size for file in Path(out).glob(f"{graph(Path(out)).name}*"))
    return {"touched_bytes": size - position_bytes(graph(Path(out))), "size_bytes": size}


def position_bytes(file: Path) -> int:
    """Bytes of the position embedding with scales and zero points, of which a step reads only one row."""
    import onnx

    tensors = onnx.load(file, load_external_data=False).graph.initializer
    sizes = {t.name: math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors}
    return sum(size for name, size in sizes.items() if ".wpe.weight" in name)
