"""Check that this device computes what an exported model must give. This module works without the training packages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmpt_export.extras import require
from dmpt_export.requests.sources import usage_of_runtime

if TYPE_CHECKING:
    from runtime.self_check import SelfCheck


@dataclass(frozen=True)
class Checked:
    scheme: str  # how the weights are stored
    routes: dict[str, int]  # positions of the proof by leaf
    found: SelfCheck


@dataclass(frozen=True)
class CheckRequest:
    model: str  # ONNX folder
    device: str = "cpu"  # cpu or cuda
    threads: int | None = None  # of the CPU; None: what this process may use

    def check(self) -> None:
        """Raise OptionError for a number of threads that cannot be, then ModelError for a folder without a proof."""
        require(self.device)
        from runtime.manifest_file import read_manifest
        from runtime.proof import read_proof
        from runtime.threads import resolve_threads

        with usage_of_runtime():
            resolve_threads(self.threads, False)
        read_proof(Path(self.model), read_manifest(Path(self.model)))

    def run(self) -> Checked:
        """Compare the files with the manifest, then run the proof."""
        import runtime

        with runtime.load(self.model, self.device, self.threads) as model:
            found = model.self_check()
            manifest = model.manifest
            taken = Counter(found.proof.routes.tolist())
            routes = {leaf: taken[i] for i, leaf in enumerate(manifest.leaves)}
            return Checked(manifest.raw["quantization"]["scheme"], routes, found)
