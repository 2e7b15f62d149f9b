"""onnxruntime-genai: see this package's docstring."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any


def main() -> None:
    import numpy as np
    import onnxruntime_genai as genai

    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    model = genai.Model(request["folder"])
    tokenizer = genai.Tokenizer(model)

    def write(ids: Any, new: int, **options: Any) -> list[list[int]]:
        """ids [B, S] -> new ids of each text."""
        ids = np.asarray(ids, np.int32)
        total = ids.shape[1] + new
        params = genai.GeneratorParams(model)
        params.set_search_options(batch_size=len(ids), max_length=total, min_length=total, **options)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return [[int(i) for i in generator.get_sequence(row)[ids.shape[1] :]] for row in range(len(ids))]

    prompts, new, beams = request["prompts"], request["new_tokens"], request["beams"]
    ids = [[int(i) for i in tokenizer.encode(prompt)] for prompt in prompts]
    together = tokenizer.encode_batch(prompts).as_numpy()
    start = time.perf_counter()
    alone = [write([text], new)[0] for text in ids]
    seconds = time.perf_counter() - start
    searching = {"num_beams": 3, "past_present_share_buffer": False, "early_stopping": True, "length_penalty": 1.0}
    answer = {
        "version": f"onnxruntime-genai {version('onnxruntime-genai')}",
        "prompt_ids": ids,
        "alone": alone,
        "batch": write(together, new),
        "beams_alone": [write([text], beams, **searching)[0] for text in ids],
        "beams_batch": None,  # of prompts of one length only
        "seconds": seconds / (new * len(prompts)),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
