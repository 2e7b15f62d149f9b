"""Other runtimes for GPT-2 on a CPU, each with a module in benchmarks.peers.adapters and optionally its own Python."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.adapters import FACTS
from benchmarks.quality.divergence import kl_divergence
from benchmarks.quality.scorer import kind_of
from benchmarks.speed.processes import Worker, WorkerFailed, worker
from benchmarks.speed.timing import Target
from benchmarks.speed.worker import installed
from training.checkpoints.atomic import scratch_folder
from training.errors import InputError


@dataclass(frozen=True)
class Peer:
    """One runtime."""

    adapter: str  # module with load() and convert(), see benchmarks.peers.adapters
    schemes: tuple[str, ...]  # supported by its convert()
    packages: tuple[str, ...]  # distributions that it needs
    install: str  # the command that installs them


PEERS = {
    "transformers": Peer(
        "benchmarks.peers.adapters.torch_transformers",
        ("fp32", "bf16"),
        ("torch", "transformers"),
        "pip install torch transformers",
    ),
    "openvino": Peer(
        "benchmarks.peers.adapters.openvino_stateful",
        ("int8", "int4"),
        ("openvino", "nncf", "optimum-intel"),
        "pip install 'optimum-intel[openvino]' (and pip uninstall torchvision beside a CPU build of torch)",
    ),
    "llama.cpp": Peer(
        "benchmarks.peers.adapters.llama_cpp_gguf",
        ("q8_0", "q4_0"),
        ("llama-cpp-python", "gguf", "safetensors"),
        "pip install llama-cpp-python gguf safetensors (it compiles; where decoding crashes, leave AMX out: "
        "CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON')",
    ),
    "optimum": Peer(
        "benchmarks.peers.adapters.optimum_onnx",
        ("fp32", "int8"),
        ("optimum-onnx", "onnxruntime", "accelerate"),
        "pip install 'optimum-onnx[onnxruntime]' accelerate",
    ),
    "bitsandbytes": Peer(
        "benchmarks.peers.adapters.bitsandbytes_transformers",
        ("int8", "nf4"),
        ("bitsandbytes", "torch", "transformers", "accelerate"),
        "pip install bitsandbytes transformers accelerate",
    ),
    "ctranslate2": Peer(
        "benchmarks.peers.adapters.ctranslate2_generator",
        ("fp32", "int8"),
        ("ctranslate2", "torch", "transformers"),
        "pip install ctranslate2 torch transformers",
    ),
}


def parse(argument: str) -> tuple[str, str, str] | None:
    """(peer, scheme, GPT-2 folder or hub id) of an argument PEER:SCHEME@GPT2; None for anything else.

    Raises InputError for an unknown peer or scheme.

    >>> parse("openvino:int8@./gpt2"), parse("gpt2"), parse("model@2")
    (('openvino', 'int8', './gpt2'), None, None)
    """
    head, at, source = argument.partition("@")
    name, colon, scheme = head.partition(":")
    if not (at and colon and name and source) or Path(argument).exists():
        return None
    if name not in PEERS:
        raise InputError(f"{argument}: unknown peer '{name}': choose one of {', '.join(notations())}")
    if scheme not in PEERS[name].schemes:
        raise InputError(f"{argument}: {name} supports {' or '.join(PEERS[name].schemes)}, not '{scheme}'")
    return name, scheme, source


def notations() -> list[str]:
    """All peers with their schemes, as on the command line."""
    return [f"{name}:{scheme}" for name, peer in PEERS.items() for scheme in peer.schemes]


def missing(name: str, python: str | None = None) -> list[str]:
    """The packages of a peer that its Python lacks. Raises WorkerFailed (3) when that Python does not exist."""
    return [package for package, version in versions_of(name, python).items() if version is None]


def absence(peer: Peer, lacking: Sequence[str]) -> str:
    """The message for a peer with missing packages."""
    return f"it lacks {', '.join(lacking)}; {peer.install}"


def versions_of(name: str, python: str | None = None) -> dict[str, str | None]:
    """Versions of a peer's packages (None: missing) and of its Python. Raises WorkerFailed (3) without that Python."""
    packages = PEERS[name].packages
    if python is None:
        return {"python": platform.python_version(), **{package: installed(package) for package in packages}}
    with worker(name, python) as w:
        found: dict[str, str | None] = w.ask(do="versions", packages=list(packages))
    return found


def check_plain(source: str | Path) -> dict[str, Any]:
    """config.json of a plain float GPT-2. Raises InputError for anything else, which peers cannot read."""
    from training.checkpoints.checkpoint import read_config
    from training.checkpoints.files import resolve

    wrong = InputError(f"{source} is not a plain float GPT-2, the only kind that peers run: give a GPT-2 folder")
    if kind_of(source) != "float":
        raise wrong
    folder, config = resolve(source), read_config(source)
    if config.splits or config.n_vocab_heads > 1:
        raise wrong
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return fields


def gpt2_folder(source: str | Path, out: Path) -> Path:
    """`source`, if it is a GPT-2 folder that other libraries may read; else the same weights in `out`, with a plain
    config.json: of a DMPT without splits, and where the folder names code or other models for them to fetch.

    source: folder or hub id. Raises InputError for anything but plain float GPT-2, which is all that peers read.
    """
    from training.checkpoints.files import resolve
    from training.model.fields import PLAIN

    fields, folder = check_plain(source), resolve(source)
    foreign = fields.keys() - PLAIN or (folder / "adapter_config.json").exists()
    if fields["model_type"] == "gpt2" and not foreign:
        return folder
    if (out / "config.json").is_file():  # named by its weights, and written in one step
        return out
    kept = {name: value for name, value in fields.items() if name in PLAIN}
    plain = {**kept, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    with scratch_folder(out) as place:
        made = place / out.name
        made.mkdir()
        write_weights(folder, made, fields["model_type"])
        (made / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
        replace(made, out)
    return out


def write_weights(folder: Path, made: Path, kind: str) -> None:
    """A folder's weights as a GPT-2's; kind: its model_type. Raises OSError when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    from training.checkpoints.folder import INDEX, SINGLE, tensor_files

    if kind == "gpt2":
        index = [folder / INDEX] if not (folder / SINGLE).is_file() else []
        for file in (*index, *(path for path, _ in tensor_files(folder))):
            shutil.copyfile(file, made / file.name)
        return
    weights = load_file(folder / SINGLE)
    if (head := weights.pop("heads.0.weight", None)) is not None:
        weights["lm_head.weight"] = head
    try:
        save_file(weights, made / SINGLE, {"format": "pt"})
    except SafetensorError as error:  # its only sign of a full disk
        raise OSError(f"the GPT-2 for peers cannot be written to {made.parent.parent}: {error}") from error


def replace(made: Path, out: Path) -> None:
    """Move `made` to `out`; if another run already wrote the same there, that stays."""
    old = made.with_name("old")
    with contextlib.suppress(FileNotFoundError):
        out.rename(old)
    with contextlib.suppress(OSError):
        made.rename(out)


def prepare(
    name: str, scheme: str, source: Path, out: Path, python: str | None = None, called: str | None = None
) -> Target:
    """The target of one peer, converted from a Hugging Face GPT-2 folder to `out` unless the same package versions
    already did that.

    called: its name in the results, if not "NAME SCHEME".
    Raises WorkerFailed when packages are missing, with the install command, and when the conversion fails; an
    incomplete folder is never mistaken for a complete one.
    """
    peer = PEERS[name]
    versions = versions_of(name, python)
    if lacking := [package for package in peer.packages if versions[package] is None]:
        raise WorkerFailed(absence(peer, lacking), 3)
    if not is_converted(out, source, versions):
        with scratch_folder(out) as folder:  # another run may do the same
            made = folder / out.name
            with worker(f"{name} {scheme}", python) as w:
                request = {"adapter": peer.adapter, "source": str(source.resolve()), "scheme": scheme}
                facts = w.ask(do="convert", out=str(made), **request)
            facts |= {"versions": versions, "source_path": str(source.resolve()), "sha256": digests(made)}
            (made / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            replace(made, out)
    facts = read_facts(out)
    sizes = {key: int(facts[key]) for key in ("size_bytes", "touched_bytes")}
    return Target(called or f"{name} {scheme}", str(out), peer.adapter, python=python, **sizes)


def is_converted(out: Path, source: Path, versions: Mapping[str, str | None]) -> bool:
    """Whether `out` holds, to the byte, what these packages made from that folder: some adapters read it again."""
    try:
        facts = read_facts(out)
        made = facts["versions"], facts["source_path"], facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: convert again
        return False
    return made == (versions, str(source.resolve()), digests(out))


def digests(folder: Path) -> dict[str, str]:
    """File -> sha256 of a conversion."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FACTS):
        with open(file, "rb") as opened:
            found[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def scores(target: Target, ids: list[int], last: int, out: Path) -> NDArray[np.float32]:
    """The target's log-probs after each of the last `last` tokens: float32 [last, vocab], passed through a file."""
    with target.process() as w:
        load(w, target, 1)
        w.ask(do="score", ids=ids, last=last, out=str(out))
    found: NDArray[np.float32] = np.load(out, allow_pickle=False)
    out.unlink()
    return found


def load(w: Worker, target: Target, threads: int | None) -> dict[str, Any]:
    return w.ask(do="load", adapter=target.adapter, path=target.path, threads=threads, device="cpu")


def divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> Mapping[str, float]:
    """How far log-probs [n, vocab] are from a reference: mean KL(reference || found) in nats, top-token agreement."""
    kl, same = kl_divergence(reference, found), reference.argmax(-1) == found.argmax(-1)
    return {"mean_kl": float(kl.mean()), "same_top": float(same.mean())}
