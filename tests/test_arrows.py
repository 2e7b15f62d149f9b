"""Who may import whom. Every import statement of every package is held against the table below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import REPOSITORY

PACKAGES = ("benchmarks", "dmpt_export", "quant", "runtime", "training")

# The tower: a package may import those below it, never those above it or beside it.
LEVEL = {"runtime": 0, "training": 0, "quant": 1, "benchmarks": 2, "dmpt_export": 3}

DEVICE_ONLY = {"numpy", "onnxruntime", "tokenizers"}  # all that may be installed where runtime runs
SERVER_ONLY = {"starlette", "uvicorn", "h11"}  # the extra [serve], for runtime/server alone
# For evaluating an exported model, and for what every verb refuses in its first second.
LIGHT = {
    "": "errors progress",
    "checkpoints/": "atomic files folder",
    "cli/": "recipes/__init__ request",
    "loop/": "freeze options",
    "model/": "gpt2 shape",
    "text/": "sources windows zstd",
}
ONNXRUNTIME = "runtime.ort"  # the only module that imports it: without telemetry
# Tools of ONNX Runtime, imported in a process where benchmarks.speed.worker has switched telemetry off.
ITS_TOOLS = ("benchmarks.peers.adapters.ort_quantizers", "onnxruntime.quantization")
WITHOUT_TORCH = tuple(f"training/{room}{name}.py" for room, names in LIGHT.items() for name in names.split())


@dataclass(frozen=True)
class Import:
    importer: str  # dotted module
    target: str  # dotted module
    nested: bool  # inside a function, or for type checkers only
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(file: Path, root: Path = REPOSITORY) -> Iterator[Import]:
    """All imports of a file; relative ones are resolved."""
    importer = module_name(file, root)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or typing_only(node)
    ]
    nested = {id(inner) for node in late for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = importer.split(".") if file.name == "__init__.py" else importer.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if is_module(name, root) else base for name in submodules]
        else:
            continue
        for target in targets:
            yield Import(importer, target, id(node) in nested, node.lineno)


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def is_violation(found: Import) -> bool:
    package, sibling = (name.split(".")[0] for name in (found.importer, found.target))
    return sibling in PACKAGES and sibling != package and LEVEL[sibling] >= LEVEL[package]


def files(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    assert files(package)
    found = [entry for file in files(package) for entry in imports(file)]
    assert not [str(entry) for entry in found if is_violation(entry)]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for type checkers count too. Without circles, modules sort so that each comes
    after those it imports."""
    graph = {
        module_name(file, REPOSITORY): {
            entry.target for entry in imports(file) if entry.target.split(".")[0] in PACKAGES
        }
        for package in PACKAGES
        for file in files(package)
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_imported_from_the_module_that_defines_them(package: str) -> None:
    passed_on = []
    for file in files(package):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                source = REPOSITORY.joinpath(*str(node.module).split("."))
                known = defined(source.with_suffix(".py") if not source.is_dir() else source / "__init__.py")
                passed_on += [
                    f"{module_name(file, REPOSITORY)}:{node.lineno} {node.module}.{alias.name}"
                    for alias in node.names
                    if alias.name not in known and not is_module(f"{node.module}.{alias.name}", REPOSITORY)
                ]
    assert passed_on == []


def defined(file: Path) -> set[str]:
    """Names that a module binds at its top level, other than by importing them from this repository."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    return names


def test_test_modules_import_no_other_test_module() -> None:
    found = [entry for file in files("tests") for entry in imports(file)]
    assert not [str(entry) for entry in found if entry.target.startswith("tests.") and ".test_" in entry.target]


def test_runtime_needs_three_packages_only() -> None:
    """Its server needs an ASGI stack besides, and nothing else of runtime may import the server."""
    known = DEVICE_ONLY | {"runtime"} | sys.stdlib_module_names
    found = [entry for file in files("runtime") for entry in imports(file)]
    server = [entry for entry in found if entry.importer.startswith("runtime.server")]
    assert server
    assert not [str(entry) for entry in server if entry.target.split(".")[0] not in known | SERVER_ONLY]
    rest = [entry for entry in found if entry not in server]
    assert not [str(entry) for entry in rest if entry.target.split(".")[0] not in known]
    assert not [str(entry) for entry in rest if entry.target.startswith("runtime.server")]


def imports_onnxruntime(found: Import) -> bool:
    return (
        found.target.split(".")[0] == "onnxruntime"
        and found.importer != ONNXRUNTIME
        and (found.importer, found.target) != ITS_TOOLS
    )


def test_onnxruntime_is_imported_in_one_place() -> None:
    """Its telemetry can be prevented only before the import."""
    found = [entry for package in (*PACKAGES, "tests") for file in files(package) for entry in imports(file)]
    assert not [str(entry) for entry in found if imports_onnxruntime(entry)]
    assert ONNXRUNTIME in {entry.importer for entry in found if entry.target == "onnxruntime"}
    named = re.compile(r"(import_module|__import__)\(.onnxruntime\b")
    assert not [
        file for package in (*PACKAGES, "tests") for file in files(package) if named.search(file.read_text("utf-8"))
    ]


def test_command_modules_import_nothing_heavy_at_the_top() -> None:
    for folder, known in (("dmpt_export/cli", {"click"}), ("dmpt_export/requests", {"training"})):
        light = {"dmpt_export"} | known | sys.stdlib_module_names
        for file in files(folder):
            top = [entry for entry in imports(file) if not entry.nested]
            assert not [str(entry) for entry in top if entry.target.split(".")[0] not in light]
            told = {entry.target for entry in top if entry.target.startswith("training.")}
            assert told <= {"training.errors", "training.progress"}
    top = [entry for entry in imports(REPOSITORY / "dmpt_export" / "requests" / "run.py") if not entry.nested]
    assert not [str(entry) for entry in top if entry.target.startswith("training")]  # it runs without


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_modules_that_do_without_torch(name: str) -> None:
    if not (REPOSITORY / name).is_file():
        pytest.fail(f"{name} is gone: correct the list")
    known = {"numpy", "tokenizers", "tqdm", "training"} | sys.stdlib_module_names
    top = [entry for entry in imports(REPOSITORY / name) if not entry.nested]
    assert not [str(entry) for entry in top if entry.target.split(".")[0] not in known]


@pytest.mark.parametrize(
    "module", ["runtime", "training.text.windows", "dmpt_export.cli.main", "benchmarks.quality.perplexity"]
)
def test_imports_work_where_torch_is_not_installed(module: str) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors', 'accelerate'):\n"
        "    sys.modules[name] = None\n"  # importing it raises ImportError
        f"import {module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_check_sees_planted_violations(tmp_path: Path) -> None:
    for name in ("runtime", "training", "quant", "benchmarks", "dmpt_export/cli"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "training" / "losses.py").touch()
    planted = {
        "runtime/model.py": "def f():\n    from training import losses\n",
        "training/config.py": "import runtime\n",
        "quant/rules.py": "from training import losses\n",
        "quant/packing.py": "from .rules import x\nimport benchmarks.timing as t\n",
        "benchmarks/timing.py": "import quant, runtime\nimport dmpt_export.cli\n",
        "dmpt_export/cli/run.py": "import runtime\n",
    }
    found = []
    for name, text in planted.items():
        (tmp_path / name).write_text(text)
        found += [str(entry) for entry in imports(tmp_path / name, tmp_path) if is_violation(entry)]
    assert found == [
        "runtime.model:2 imports training.losses",
        "training.config:1 imports runtime",
        "quant.packing:2 imports benchmarks.timing",
        "benchmarks.timing:2 imports dmpt_export.cli",
    ]


def test_the_check_sees_a_planted_import_of_onnxruntime(tmp_path: Path) -> None:
    planted = tmp_path / "runtime" / "session.py"
    planted.parent.mkdir()
    planted.write_text("def f():\n    import onnxruntime as ort\n    from onnxruntime.quantization import QuantType\n")
    found = [str(entry) for entry in imports(planted, tmp_path) if imports_onnxruntime(entry)]
    assert found == ["runtime.session:2 imports onnxruntime", "runtime.session:3 imports onnxruntime.quantization"]
