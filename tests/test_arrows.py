"""Who may import whom. Every import statement of every package is held against the table below."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("benchmarks", "dmpt_export", "quant", "runtime", "training")
TRAINING_DOORS = {f"training.{name}" for name in ("config", "model", "checkpoint", "data", "errors")}

# package -> sibling modules it may import, at the top of a module or inside a function
ALLOWED: dict[str, set[str]] = {
    "runtime": set(),
    "training": set(),
    "quant": TRAINING_DOORS,
    "benchmarks": TRAINING_DOORS | {"runtime"},
    "dmpt_export": TRAINING_DOORS | {"quant", "runtime.manifest"},
}
# Inside functions, these may import every package: they are what ties the packages together.
TIES = ("dmpt_export.commands.", "dmpt_export.demo.")
LAZY = {"dmpt_export": {"runtime"}}  # inside functions only: checking an export runs it

DEVICE_ONLY = {"numpy", "onnxruntime", "tokenizers"}  # all that may be installed where runtime runs
# For evaluating an exported model, and for what every verb refuses in its first second.
LIGHT = "atomic data errors files folder freeze gpt2 options progress recipes/__init__ shape sources zstd".split()
WITHOUT_TORCH = tuple(f"training/{name}.py" for name in LIGHT)


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


def imports(file: Path, root: Path = ROOT) -> Iterator[Import]:
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


def covers(allowed: set[str], target: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def is_violation(found: Import) -> bool:
    package, sibling = (name.split(".")[0] for name in (found.importer, found.target))
    if sibling not in PACKAGES or sibling == package:
        return False
    if found.nested and (found.importer.startswith(TIES) or covers(LAZY.get(package, set()), found.target)):
        return False
    return not covers(ALLOWED[package], found.target)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_table_allows(package: str) -> None:
    assert files(package)
    found = [entry for file in files(package) for entry in imports(file)]
    assert not [str(entry) for entry in found if is_violation(entry)]


def test_runtime_needs_three_packages_only() -> None:
    known = DEVICE_ONLY | {"runtime"} | sys.stdlib_module_names
    found = [entry for file in files("runtime") for entry in imports(file)]
    assert not [str(entry) for entry in found if entry.target.split(".")[0] not in known]


def test_command_modules_import_nothing_heavy_at_the_top() -> None:
    light = {"click", "dmpt_export"} | sys.stdlib_module_names
    for file in files("dmpt_export/commands"):
        top = [entry for entry in imports(file) if not entry.nested]
        assert not [str(entry) for entry in top if entry.target.split(".")[0] not in light]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_modules_that_do_without_torch(name: str) -> None:
    if not (ROOT / name).is_file():
        pytest.fail(f"{name} is gone: correct the list")
    known = {"numpy", "tokenizers", "tqdm", "training"} | sys.stdlib_module_names
    top = [entry for entry in imports(ROOT / name) if not entry.nested]
    assert not [str(entry) for entry in top if entry.target.split(".")[0] not in known]


@pytest.mark.parametrize("module", ["runtime", "training.data", "dmpt_export.cli", "benchmarks.quality"])
def test_imports_work_where_torch_is_not_installed(module: str) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors', 'accelerate', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"  # importing it raises ImportError
        f"import {module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_check_sees_planted_violations(tmp_path: Path) -> None:
    for name in ("runtime", "training", "quant", "dmpt_export/commands"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "training" / "losses.py").touch()
    planted = {
        "runtime/model.py": "def f():\n    from training import config\n",
        "quant/rules.py": "from training import losses\n",
        "quant/packing.py": "from .rules import x\nimport training.trainer as t\n",
        "dmpt_export/commands/run.py": "import runtime\n\ndef command():\n    import training.losses\n",
    }
    found = []
    for name, text in planted.items():
        (tmp_path / name).write_text(text)
        found += [str(entry) for entry in imports(tmp_path / name, tmp_path) if is_violation(entry)]
    assert found == [
        "runtime.model:2 imports training",
        "quant.rules:1 imports training.losses",
        "quant.packing:2 imports training.trainer",
        "dmpt_export.commands.run:1 imports runtime",
    ]
