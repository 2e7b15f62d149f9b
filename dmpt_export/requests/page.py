"""An exported model -> a static web page that runs it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import FieldError, InputError

if TYPE_CHECKING:
    from runtime.manifest import Manifest

# Files of npm packages that the page loads: folder of the package -> files in it.
VENDOR = {
    "onnxruntime-web": (
        "dist/ort.wasm.min.mjs", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm",
    ),
    "@huggingface/tokenizers": ("dist/tokenizers.min.mjs", "LICENSE"),
}  # fmt: skip


@dataclass(frozen=True)
class PageRequest:
    model: str  # ONNX folder
    out: str  # folder
    modules: str = "node_modules"  # folder with the npm packages
    overwrite: bool = False  # an earlier page in `out` is replaced

    def check(self) -> Manifest:
        """Raise InputError for a folder, target or package that the page cannot use."""
        from runtime.files import check_data, check_files
        from runtime.manifest import PER_TENSOR
        from runtime.manifest_file import read_manifest
        from training.checkpoints.links import check_link
        from training.checkpoints.places import check_inputs, check_new

        check_new(Path(self.out), "page", self.overwrite)
        check_inputs(Path(self.out), self.model, self.modules)
        manifest = read_manifest(Path(self.model))
        if manifest.activation_dtype != "float32":
            raise InputError(f"{self.model} was exported for {manifest.target}: a page needs --target web")
        if "tokenizer.json" not in {entry.name for entry in manifest.files}:
            raise InputError(f"{self.model} has no tokenizer, which a page needs to read what is typed")
        if (
            len(manifest.tree) > 1
            and "branches_inline" not in manifest.raw
            and any(
                tensor.get("block") and tensor["scheme"] != PER_TENSOR and name.startswith("paths.")
                for name, tensor in manifest.raw["quantization"]["tensors"].items()
            )
        ):
            raise InputError(
                f"{self.model} was made by an earlier dmpt-export, with scales where browsers cannot read them: export "
                "the model again"
            )
        check_files(Path(self.model), manifest)
        check_data(Path(self.model), [manifest.model], (entry.name for entry in manifest.files))
        missing = [name for name, file in self.vendor().items() if not file.is_file()]
        if missing:
            raise FieldError(
                "{} lacks {}: run `npm install onnxruntime-web @huggingface/tokenizers` and give its node_modules "
                "with {modules}", self.modules, ", ".join(missing),
            )  # fmt: skip
        for package, files in VENDOR.items():  # npm links whole packages, and makes no link inside one
            for file in files:
                check_link(Path(self.modules) / package, file)
        return manifest

    def vendor(self) -> dict[str, Path]:
        """Name in the page's folder `vendor` -> file of a package."""
        packages = {name: Path(self.modules) / name for name in VENDOR}
        return {
            f"{name.rpartition('/')[2]}.{file}" if file == "LICENSE" else Path(file).name: packages[name] / file
            for name, files in VENDOR.items()
            for file in files
        }

    def run(self, manifest: Manifest) -> None:
        """Write the folder, after check()."""
        import runtime
        from runtime.manifest_file import MANIFEST_NAME
        from training.checkpoints.atomic import atomic_folder
        from training.checkpoints.lock import working_in

        scripts = Path(runtime.__file__).parent / "web"
        with working_in(self.out, "page", beside=True), atomic_folder(Path(self.out), "page") as out:
            for file in (*scripts.glob("*.mjs"), *(scripts / "page").iterdir()):
                shutil.copyfile(file, out / file.name)
            (out / "vendor").mkdir()
            for name, file in self.vendor().items():
                shutil.copyfile(file, out / "vendor" / name)
            (out / "model").mkdir()
            for name in (MANIFEST_NAME, *(entry.name for entry in manifest.files)):
                if (Path(self.model) / name).is_file():  # README.md may be absent
                    shutil.copyfile(Path(self.model) / name, out / "model" / name)
