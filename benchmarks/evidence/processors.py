"""Check that exports load and give equal results on other processors: every scheme and tree, emulated; no times.

    python -m benchmarks.evidence.processors --work WORK [--qemu FOLDER] [--arm SYSTEM --arm-site SITE ...]

Tiny random models are quantized and exported (with the usual check) in WORK, then run here and on each processor that
an installed emulator provides; missing emulators are listed. A cell is the worst mean KL to this machine, in nats, and
that of the export's own proof, to torch.

--qemu: folder of qemu-user's programs, else those on the PATH. QEMU 7.2 crashes when onnxruntime 1.28 or later is
imported on Arm, and computes int8-dynamic's product wrongly with SME (the processor `max`); 10.0 does neither.
--arm: root of an unpacked Arm system with Python 3.11, such as Debian's arm64 packages python3.11, python3.11-minimal,
libpython3.11-minimal, libpython3.11-stdlib, libc6, libgcc-s1, libstdc++6, zlib1g, libexpat1, libssl3, libffi8,
libbz2-1.0, liblzma5, libsqlite3-0, libuuid1 and libcrypt1 (`apt-get download NAME:arm64`, `dpkg -x`).
--arm-site: packages for it, `pip install --target SITE --python-version 3.11 --platform manylinux_2_28_aarch64
--platform manylinux2014_aarch64 --only-binary=:all: onnxruntime numpy tokenizers click tqdm`; several are tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.driver import dmpt_export, say
from benchmarks.evidence.models import steer
from benchmarks.quality.divergence import kl_divergence

ARM, X86 = ("cortex-a57", "cortex-a76", "max"), ("Haswell", "Nehalem")  # names that QEMU knows
ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("processor_probe.py")
TREES: dict[str, dict[str, Any]] = {
    "gpt2": {"splits": [], "head_allocation": {"root": [0]}, "tie_word_embeddings": True},
    "dual": {"splits": [2], "fast_k": 16},
    "quad": {"splits": [2, 3], "fast_k": 16},
    # head 0 is the left anchor and a candidate on the right
    "shared": {"splits": [2], "head_allocation": {"left": [0, 1, 2], "right": [3, 0, 4]}, "fast_k": 16},
    "projected": {"splits": [2], "head_kind": "projected", "fast_k": 16},
    "one matrix": {"splits": [2], "head_kind": "projected", "shared_anchor": True, "fast_k": 16},
}
QUANTIZED = {
    "float32": (),
    "fp16": ("--scheme", "fp16"),
    "int8": ("--scheme", "int8"),
    "int8 zero points": ("--scheme", "int8", "--asymmetric"),
    "int8-dynamic": ("--scheme", "int8-dynamic"),
    "int4": ("--scheme", "int4"),
    "int4 block 128": ("--scheme", "int4", "--block", "128"),
    "int4 zero points": ("--scheme", "int4", "--asymmetric"),
    "int4-gptq": ("--scheme", "int4-gptq", "--calib", "TEXT"),
    "int4-hqq": ("--scheme", "int4-hqq"),
    "int3": ("--scheme", "int3"),
    "int2": ("--scheme", "int2"),
    "int2 zero points": ("--scheme", "int2", "--asymmetric"),
    "nf4": ("--scheme", "nf4", "--rule", "transformer.wte=int8", "--rule", "heads.*=int8"),
    "fp4": ("--scheme", "fp4", "--rule", "transformer.wte=int8", "--rule", "heads.*=int8"),
    "bnb-int8": ("--scheme", "bnb-int8"),
    "int4 deltas": ("--scheme", "int4", "--rule", "heads.*=delta-r16"),
}
CACHES = ("float32", "int8", "int4")  # schemes also tested with an int8 cache


@dataclass(frozen=True)
class Case:
    """One export."""

    tree: str
    scheme: str
    cache: str = "float"

    @property
    def name(self) -> str:
        return f"{self.tree}, {self.scheme}" + (", int8 cache" if self.cache == "int8" else "")

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "_")


@dataclass(frozen=True)
class Processor:
    """A processor to test: the command that starts Python there, and its environment."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, device: Path, out: Path) -> str | None:
        """Write the probe's outputs to `out`; returns a short error, or None."""
        environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | self.environment
        command = [*self.command, str(PROBE), str(device), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            return None
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        crashed = done.returncode < 0 or "uncaught target signal" in done.stderr
        return "CRASH" if crashed else f"refused: {last.partition(': ')[2][:200]}"


def cases() -> Iterator[Case]:
    for tree in TREES:
        for scheme in QUANTIZED:
            if not (tree == "gpt2" and "deltas" in scheme):
                yield Case(tree, scheme)
        for scheme in CACHES:
            yield Case(tree, scheme, "int8")


# --- models -------------------------------------------------------------------------------------------


def make_source(tree: str, out: Path, text: Path) -> None:
    """A random model in which every part affects the output, with a tokenizer trained on `text`.

    Each position's route is drawn at random, so that rounding in kernels cannot change a route."""
    import torch

    from training.checkpoints.checkpoint import save_model
    from training.model.config import DMPTConfig
    from training.model.generation import DMPTForCausalLM
    from training.model.shape import even_allocation, leaf_names
    from training.text.sources import read_lines
    from training.text.windows import train_tokenizer

    fields: dict[str, Any] = {"head_allocation": even_allocation(leaf_names(TREES[tree]["splits"], 4), 8)}
    fields |= {"tie_word_embeddings": False, "gate_hidden": 16} | TREES[tree]
    sizes: dict[str, Any] = {"vocab_size": 320, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 4}
    torch.manual_seed(0)
    model = DMPTForCausalLM(DMPTConfig(**sizes, **fields, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=1.0 if "gates" in name else 0.1)
            if ".ln_" in name and name.endswith("weight"):
                parameter += 1
        coins = torch.Generator().manual_seed(1)
        steer(model, {name: torch.randint(0, 2, (64,), generator=coins) for name in model.gates})
    tokenizer = out.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    train_tokenizer(read_lines(text), 320).save(str(tokenizer / "tokenizer.json"))
    save_model(model, out, tokenizer_from=tokenizer)


def make(case: Case, work: Path) -> str | None:
    """Export a case to WORK unless it exists; returns the reason if that fails, else None."""
    device, text = work / case.folder, ROOT / "README.md"
    if device.is_dir():
        return None
    source, quantized = work / f"{case.tree}-source", work / f"{case.tree}-{case.scheme.replace(' ', '_')}-weights"
    if not source.is_dir():
        make_source(case.tree, source, text)
    options = [str(text) if option == "TEXT" else option for option in QUANTIZED[case.scheme]]
    if options and not quantized.is_dir() and (why := failure("quantize", source, quantized, *options)):
        return why
    return failure("onnx", quantized if options else source, device, "--kv-cache", case.cache)


def failure(*arguments: object) -> str | None:
    """Run a verb; returns the last line of its error, or None."""
    done = dmpt_export(*arguments, threads=1, capture_output=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


# --- processors ---------------------------------------------------------------------------------------


def processors(options: argparse.Namespace) -> Iterator[Processor | str]:
    """The processors that can be emulated here; for the others a line with what is missing."""
    here = [str(path) for path in map(Path, sys.path) if path.name == "site-packages"]
    for machine, names in (("aarch64", ARM), ("x86_64", X86)):
        found = (shutil.which(f"qemu-{machine}{end}", path=options.qemu) for end in ("", "-static"))
        emulator = next(filter(None, found), None)
        if emulator is None:
            yield f"{', '.join(names)}: not tested, qemu-{machine} is missing"
        elif machine == "x86_64":
            path = os.pathsep.join([str(ROOT), *here])
            for name in names:
                command = [emulator, "-cpu", name, os.path.realpath(sys.executable)]
                yield Processor(f"{name}, onnxruntime {version('onnxruntime')}", command, {"PYTHONPATH": path})
        elif not options.arm or not options.arm_site:
            yield f"{', '.join(names)}: not tested, --arm and --arm-site were not given"
        else:
            python = next(options.arm.glob("usr/bin/python3.*[0-9]"))
            for site in options.arm_site:
                ort = next(site.glob("onnxruntime-*.dist-info")).name.split("-")[1].removesuffix(".dist")
                path = os.pathsep.join([str(ROOT), str(site)])
                for name in names:
                    command = [emulator, "-cpu", name, "-L", str(options.arm), str(python)]
                    yield Processor(f"{name}, onnxruntime {ort}", command, {"PYTHONPATH": path})


# --- comparing ----------------------------------------------------------------------------------------


def verdict(want: Path, got: Path, device: Path) -> str:
    """The worst mean KL of a run in nats, or the error: a different route, or KL beyond the export's tolerance. After a
    semicolon, what the device's own check found: its worst mean KL to torch, or FAIL."""
    there = np.load(got)
    failure, kl = str(there["proof"]), float(there["proof.kl"])
    found = f"FAIL: {failure}" if failure else f"{kl:.1e}"
    return f"{difference(want, got, device)}; {found}"


def difference(want: Path, got: Path, device: Path) -> str:
    """How far the processor is from this machine."""
    tolerance = json.loads((device / "dmpt_manifest.json").read_text())["parity"]["tolerance"]
    here, there = np.load(want), np.load(got)
    worst = 0.0
    for run in [name.removesuffix(".routes") for name in here if name.endswith(".routes")]:
        routes = here[f"{run}.routes"] != there[f"{run}.routes"]
        if routes.any():
            return f"WRONG: {run}: {routes.sum()} of {routes.size} routes differ"
        a, b = here[f"{run}.log_probs"], there[f"{run}.log_probs"]
        kl, largest = float(kl_divergence(a, b).mean()), float(np.abs(a - b).max())
        if not kl <= tolerance["kl_mean"] or (tolerance["max_abs"] and not largest <= tolerance["max_abs"]):
            return f"WRONG: {run}: KL {kl:.2g}, largest difference {largest:.2g}"
        worst = max(worst, kl)
    return f"{worst:.1e}"


def table(columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| export | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if an export crashed, differed or failed its proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--qemu")
    parser.add_argument("--arm", type=Path)
    parser.add_argument("--arm-site", type=Path, action="append", default=[])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    found = list(processors(options))
    absent = [line for line in found if isinstance(line, str)]
    there = [processor for processor in found if isinstance(processor, Processor)]
    here = Processor("this machine", [sys.executable], {"PYTHONPATH": str(ROOT)})
    rows: dict[str, list[str]] = {}
    for case in cases():
        if options.only not in case.name:
            continue
        device, want = options.work / case.folder, options.work / f"{case.folder}.npz"
        if why := make(case, options.work) or here.run(device, want):
            absent.append(f"{case.name}: {why}")
            continue
        rows[case.name] = []
        for i, processor in enumerate(there):
            got = options.work / f"{case.folder}.{i}.npz"
            rows[case.name].append(processor.run(device, got) or verdict(want, got, device))
        say(f"{case.name}: {', '.join(rows[case.name])}")
    text = "\n".join([table([processor.name for processor in there], rows), "", *absent])
    (options.work / "processors.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return int(any(cell.startswith(("CRASH", "WRONG")) or "FAIL" in cell for cells in rows.values() for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
