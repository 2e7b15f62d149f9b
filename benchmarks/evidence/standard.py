"""Open exports of the standard layout in the packages that it is for, and compare what they write with our runtime.

    python -m benchmarks.evidence.standard --models CHECKPOINT ... --work WORK \\
        --optimum PYTHON --genai PYTHON --transformers-js FOLDER

For each checkpoint and storage (float32, int8, int4): the native export writes greedily from five prompts; each package
does the same with the standard export, one prompt at a time and in a padded batch, and with beams. A cell counts equal
tokens up to the first difference. For float weights all are expected to be equal; int8 and int4 kernels round the rows
of a batch and of a prompt differently, so that two nearly equally likely tokens may change places.

--optimum, --genai: interpreters with `pip install torch==2.13.0 'optimum-onnx[onnxruntime]'` and `onnxruntime-genai`.
--transformers-js: a folder where `npm install @huggingface/transformers` was run. Missing ones are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from benchmarks.evidence.driver import dmpt_export, say
from runtime.ort import no_telemetry

HERE = Path(__file__).with_name("packages")
STORED = {"float32": (), "int8": ("--scheme", "int8"), "int4": ("--scheme", "int4")}
PROMPTS = [
    "Return a new",
    "The file is opened in text mode, and",
    "If the argument is not a string, a",
    "Changed in version 3.8: The",
    "This function",
]
NEW_TOKENS, BEAM_TOKENS = 100, 20


def main() -> None:
    no_telemetry()  # the packages' programs inherit it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--optimum", help="Python interpreter")
    parser.add_argument("--genai", help="Python interpreter")
    parser.add_argument("--transformers-js", type=Path, help="folder with node_modules")
    options = parser.parse_args()
    results = []
    for model in options.models:
        for stored, how in STORED.items():
            folders = exported(model, options.work / f"{model.name}-{stored}", how)
            want = written(folders["native"])
            for package, command, place in programs(options):
                row = measured(folders["standard"], want, command, place, options.work)
                results.append({"model": model.name, "stored": stored, "package": package, **row})
                say(str(results[-1]))
    (options.work / "packages.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(results) + "\n")


def programs(options: argparse.Namespace) -> list[tuple[str, list[str], Path | None]]:
    """(package, command, working folder) of those that were given."""
    found: list[tuple[str, list[str], Path | None]] = []
    if options.optimum:
        found.append(("optimum", [options.optimum, str(HERE / "optimum_program.py")], None))
    if options.genai:
        found.append(("onnxruntime-genai", [options.genai, str(HERE / "genai_program.py")], None))
    if options.transformers_js:
        found.append(("transformers.js", ["node", str(HERE / "transformers_program.mjs")], options.transformers_js))
    return found


def exported(model: Path, out: Path, how: tuple[str, ...]) -> dict[str, Path]:
    """The model in both layouts, exported and checked; made once."""
    folders = {layout: out / layout for layout in ("native", "standard")}
    for layout, folder in folders.items():
        if not folder.exists():
            dmpt_export("onnx", model, folder, "--layout", layout, *how)
    return folders


def written(folder: Path) -> dict[str, list[list[int]]]:
    """Prompts' ids and greedy continuations of the native export, one token at a time, without ends of text: the
    packages are asked for that many tokens, which keeps them from ending."""
    with runtime.load(folder, threads=1) as model:
        prompts = [model.prompt_ids(prompt).tolist() for prompt in PROMPTS]
        new: list[list[int]] = []
        for ids in prompts:
            sequence, text = model.sequence(), [int(x) for x in ids]
            for _ in range(NEW_TOKENS):
                log_probs = sequence.feed(text[sequence.length :], last=1)[0][0]
                log_probs[list(model.ends)] = -np.inf
                text.append(int(log_probs.argmax()))
            new.append(text[len(ids) :])
    return {"prompt_ids": prompts, "new": new}


def measured(
    folder: Path, want: dict[str, list[list[int]]], command: list[str], place: Path | None, work: Path
) -> dict[str, Any]:
    """Run one package's program: how many tokens are as in our runtime."""
    request = work / "request.json"
    request.write_text(
        json.dumps({"folder": str(folder.resolve()), "prompts": PROMPTS, "new_tokens": NEW_TOKENS,
                    "beams": BEAM_TOKENS}),
        encoding="utf-8",
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [*command, str(request.resolve())]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    alone, together = answer["beams_alone"], answer["beams_batch"]
    return {
        "version": answer["version"],
        "same_prompts": answer["prompt_ids"] == want["prompt_ids"],
        "alone": [until_different(*pair) for pair in zip(answer["alone"], want["new"], strict=True)],
        "batch": [until_different(*pair) for pair in zip(answer["batch"], want["new"], strict=True)],
        "beams": None if together is None else [a == b for a, b in zip(alone, together, strict=True)],
        "beam_ids": alone,
        "ms_per_token": 1000 * answer["seconds"],
    }


def until_different(got: list[int], want: list[int]) -> int:
    """Equal tokens before the first different one.

    >>> until_different([1, 2, 3], [1, 2, 4])
    2
    """
    pairs = enumerate(zip(got, want, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(got), len(want)))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| model | stored | package | alone: equal of {NEW_TOKENS} | in a padded batch | beams alone = batch |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        cells = [row["model"], row["stored"], row.get("version", row["package"])]
        if "error" in row:
            cells += [f"failed: {row['error']}", "", ""]
        else:
            beams = "none" if row["beams"] is None else f"{sum(row['beams'])} of {len(row['beams'])}"
            cells += [" ".join(map(str, row["alone"])), " ".join(map(str, row["batch"])), beams]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
