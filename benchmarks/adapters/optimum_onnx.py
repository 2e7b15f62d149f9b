"""The peer optimum-onnx: its export of GPT-2 through ORTModelForCausalLM, float32 or its dynamic int8."""

from __future__ import annotations

import math
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Optimum:
    """A loaded folder; see benchmarks.adapters.Adapter. Steps call forward(), without generate()'s loop."""

    def __init__(self, path: str, threads: int | None) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
            torch.set_num_threads(threads)
        self.torch = torch
        self.model = ORTModelForCausalLM.from_pretrained(
            path, file_name=graph(Path(path)).name, session_options=options
        )
        self.context, self.vocab_size = self.model.config.n_positions, self.model.config.vocab_size
        self.threads = int(torch.get_num_threads())

    def feed(self, ids: list[int], past: Any = None, seen: int = 0) -> Any:
        torch = self.torch
        total = seen + len(ids)
        return self.model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, total, dtype=torch.int64),
            position_ids=torch.arange(seen, total)[None],
            past_key_values=past,
            use_cache=True,
        )

    def prefill(self, ids: list[int]) -> float:
        start = perf_counter()
        self.feed(ids)
        return perf_counter() - start

    def decode(self, ids: list[int], n: int) -> tuple[float, list[int], list[int]]:
        out = self.feed(ids)
        fed: list[int] = []
        start = perf_counter()
        for i in range(n):
            fed.append(int(out.logits[0, -1].argmax()))
            out = self.feed(fed[-1:], out.past_key_values, len(ids) + i)
        return perf_counter() - start, fed, [0] * n

    def score(self, ids: list[int], last: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.feed(ids).logits[0, -last:].log_softmax(-1).numpy()
        return found


def load(path: str, threads: int | None, device: str) -> Optimum:
    return Optimum(path, threads)


def graph(folder: Path) -> Path:
    quantized = folder / "model_quantized.onnx"
    return quantized if quantized.is_file() else folder / "model.onnx"


def convert(source: str, out: str, scheme: str) -> dict[str, Any]:
    """An ONNX folder of a Hugging Face GPT-2 folder; scheme: fp32, or int8 by optimum's dynamic quantizer."""
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
    """The position embedding's, its scales and zero points included: a step reads one row of it."""
    import onnx

    tensors = onnx.load(file, load_external_data=False).graph.initializer
    sizes = {t.name: math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors}
    return sum(size for name, size in sizes.items() if ".wpe.weight" in name)
