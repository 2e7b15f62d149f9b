"""Print the docstrings of modules written in C as JSON: {module: [[signature, docstring], ...]}.

Run as a script in a fresh interpreter (`python -I -S`), never imported by the package: then patches that other
libraries apply to `sys` or `builtins` cannot change the corpus, and a module that fails to load does no harm.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import types
from importlib import import_module
from pathlib import Path

# Test helpers, and a module whose import writes to the terminal.
SKIPPED_PREFIXES = ("_test", "_xx", "xx", "_ctypes_test", "readline")


def c_modules() -> list[str]:
    """Names of the modules compiled into the interpreter and of the extension modules beside its library."""
    folder = Path(sysconfig.get_path("platstdlib")) / "lib-dynload"
    names = set(sys.builtin_module_names) | {file.name.split(".")[0] for file in folder.glob("*.*")}
    return sorted(name for name in names if not name.startswith(SKIPPED_PREFIXES))


def signature(name: str, value: object) -> str:
    text = getattr(value, "__text_signature__", None) or ""
    return name + text.replace("$", "")


def entries(module: types.ModuleType) -> list[tuple[str, str]]:
    """(signature, docstring) of the module, its functions, its types and their members, in name order."""
    found = [("", module.__doc__ or "")]
    for name, value in sorted(vars(module).items()):
        if isinstance(value, types.BuiltinFunctionType):
            found.append((f"def {signature(name, value)}", value.__doc__ or ""))
        elif isinstance(value, type):
            found.append((f"class {signature(name, value)}", value.__doc__ or ""))
            for member, attribute in sorted(vars(value).items()):
                if member != "__doc__" and callable(attribute):
                    found.append((f"def {signature(member, attribute)}", attribute.__doc__ or ""))
    return [(head, text) for head, text in found if isinstance(text, str) and text]


def main() -> None:
    docs: dict[str, list[tuple[str, str]]] = {}
    for name in c_modules():
        try:
            docs[name] = entries(import_module(name))
        except ImportError:  # built against a library that this machine lacks
            continue
    json.dump(docs, sys.stdout)


if __name__ == "__main__":
    main()
