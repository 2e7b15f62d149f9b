"""optimum's ORTModelForCausalLM: see this package's docstring."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any


def main() -> None:
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    model = ORTModelForCausalLM.from_pretrained(request["folder"])

    def write(prompts: list[str], new: int, **options: Any) -> list[list[int]]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
        return [row[inputs.input_ids.shape[1] :] for row in out.tolist()]

    prompts, new, beams = request["prompts"], request["new_tokens"], request["beams"]
    start = time.perf_counter()
    alone = [write([prompt], new)[0] for prompt in prompts]
    seconds = time.perf_counter() - start
    answer = {
        "version": f"optimum-onnx {version('optimum-onnx')}, optimum {version('optimum')}",
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "alone": alone,
        "batch": write(prompts, new),
        "beams_alone": [write([prompt], beams, num_beams=3)[0] for prompt in prompts],
        "beams_batch": write(prompts, beams, num_beams=3),
        "seconds": seconds / (new * len(prompts)),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
