"""A text corpus without network: the documentation inside the running Python, split by module.

    language reference (pydoc topics) --+
    docstrings and comments of *.py  ---+--> documents --> train | held out --> lines, without repeats
    docstrings of modules in C ---------+

One line per paragraph (the evaluation reads lines). The same Python gives the same text, byte for byte.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.errors import FieldError, InputError

MIN_BYTES = 3_000_000  # an ordinary Python 3.11+ has more
HELD_OUT = 0.04  # share of the text kept for evaluation
LARGEST_HELD_OUT = 0.01  # a module above this share is always training text, so that many others can be held out
# Not documentation of the library, or not installed everywhere.
SKIPPED = {
    "__phello__", "__pycache__", "dist-packages", "ensurepip", "encodings", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
SHINGLE = 8  # words; two paragraphs that share half of these runs are near-duplicates


@dataclass(frozen=True)
class Document:
    """The text of one module or topic: `entries` are (signature or "", text)."""

    name: str
    entries: list[tuple[str, str]]

    @property
    def group(self) -> str:
        """Documents of a group stay on the same side of the split: a package, or a module and its C or Python twin."""
        return re.sub(r"^(_py|_)", "", self.name.split(".")[0])

    @property
    def size(self) -> int:
        return sum(len(head) + len(text) for head, text in self.entries)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text: one paragraph per line, an empty line after each document."""

    train: str
    held_out: str

    @property
    def n_bytes(self) -> int:
        return len(self.train.encode()) + len(self.held_out.encode())


def documentation_corpus(seed: int = 0, held_out: float = HELD_OUT) -> Corpus:
    """The documentation of the running Python. Raises InputError when its library has too little."""
    documents = [*topic_documents(), *source_documents(), *builtin_documents()]
    corpus = split(documents, seed, held_out)
    if corpus.n_bytes < MIN_BYTES // 3:
        raise FieldError(
            "this Python ({}) has only {} bytes of documentation: use another one, or give text with {data}",
            sys.executable, f"{corpus.n_bytes:,}",
        )  # fmt: skip
    return corpus


def text_corpus(texts: dict[str, str], seed: int = 0, held_out: float = HELD_OUT) -> Corpus:
    """A corpus from the user's texts (name -> text), held out in runs of lines. InputError when too short."""
    documents = []
    for name, text in texts.items():
        lines = [line for line in text.splitlines() if line.strip()]
        step = max(1, len(lines) // 100)  # so that held-out runs come from all parts of the text
        documents += [
            Document(f"{name}:{start}".replace(".", "_"), [("", line) for line in lines[start : start + step]])
            for start in range(0, len(lines), step)
        ]
    corpus = split(documents, seed, held_out, largest=1.0)
    if not corpus.train.strip() or not corpus.held_out.strip():
        raise InputError(f"{', '.join(texts)}: too little text to train on and to hold out; give at least 50 lines")
    return corpus


# --- sources ------------------------------------------------------------------------------------


def topic_documents() -> list[Document]:
    """The language reference as shown by `help()`."""
    from pydoc_data.topics import topics

    return [Document(f"topic-{name}", [("", text)]) for name, text in sorted(topics.items())]


def source_documents() -> list[Document]:
    """Docstrings, signatures and block comments of the standard library's modules, read without importing them."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in sorted(library.rglob("*.py"), key=lambda f: f.relative_to(library).as_posix()):
        parts = file.relative_to(library).with_suffix("").parts
        if SKIPPED.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        try:
            with tokenize.open(file) as handle:
                source = handle.read()
            documents.append(Document(name, source_entries(source)))
        except (SyntaxError, UnicodeDecodeError):  # templates and bad-syntax samples
            continue
    return documents


def source_entries(source: str) -> list[tuple[str, str]]:
    """(signature, docstring) of a module and everything defined in it, and its comments, in the source's order."""
    module = ast.parse(source)
    found = [(0, "", ast.get_docstring(module) or "")]
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, node.bases))
            found.append((node.lineno, f"class {node.name}({bases})", ast.get_docstring(node) or ""))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node.lineno, f"def {node.name}({ast.unparse(node.args)})", ast.get_docstring(node) or ""))
    found += [(line, "", text) for line, text in block_comments(source)]
    return [(head, text) for _, head, text in sorted(found)]


def block_comments(source: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of comments as long as a sentence."""
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#!").removeprefix(" "))
            continue
        if sum(len(text.split()) for text in block) >= SHINGLE:
            yield number, "\n".join(block)
        block = []


def builtin_documents() -> list[Document]:
    """Docstrings of modules written in C, read in a fresh interpreter (see builtin_docs.py)."""
    script = Path(__file__).with_name("builtin_docs.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", str(script)],
        capture_output=True, check=True, encoding="utf-8",
    )  # fmt: skip
    return [Document(name, [(h, t) for h, t in entries]) for name, entries in json.loads(done.stdout).items()]


# --- splitting and cleaning ---------------------------------------------------------------------


def split(documents: list[Document], seed: int, held_out: float, largest: float = LARGEST_HELD_OUT) -> Corpus:
    """Put whole groups on one side, in an order drawn from the seed; then remove repeats on both sides.

    held_out: share of the text for evaluation; a group above the share `largest` is never held out.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + document.size
    total = sum(sizes.values())
    kept: set[str] = set()
    kept_size = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if kept_size >= held_out * total:
            break
        if sizes[group] <= largest * total:
            kept.add(group)
            kept_size += sizes[group]
    seen: set[str] = set()
    train = render((d for d in documents if d.group not in kept), seen)
    known = set(shingles(train))
    rest = render((d for d in documents if d.group in kept), seen)
    return Corpus(train, "\n".join(line for line in rest.split("\n") if not near_duplicate(line, known)))


def render(documents: Iterable[Document], seen: set[str]) -> str:
    """Documents as lines; lines in `seen` are left out, new ones are added to it."""
    out: list[str] = []
    for document in documents:
        lines: list[str] = []
        for head, text in document.entries:
            body = [line for line in paragraphs(text) if line not in seen]
            if text and not body:
                continue  # a signature without a new docstring adds nothing
            seen.update(body)
            if head and head not in seen:
                seen.add(head)
                lines.append(head)
            lines += body
        if lines:
            out += [*lines, ""]
    return "\n".join(out)


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs as single lines; interactive examples keep their line breaks, rulers are dropped."""
    for block in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in block.splitlines()]
        lines = [line for line in lines if re.search(r"\w", line)]
        if any(line.startswith(">>>") for line in lines):
            yield from lines
        elif lines:
            yield " ".join(lines)


def shingles(text: str) -> Iterator[int]:
    """Hashes of each line's runs of SHINGLE words."""
    for line in text.split("\n"):
        words = re.findall(r"\w+", line.lower())
        for i in range(len(words) - SHINGLE + 1):
            yield hash(" ".join(words[i : i + SHINGLE]))


def near_duplicate(line: str, known: set[int]) -> bool:
    own = list(shingles(line))
    return 2 * sum(shingle in known for shingle in own) > len(own) > 0
