"""README.md of model folders: a model card in the form of the Hugging Face hub.

The card begins with metadata in YAML (docs of the hub: Model Cards, "Model card metadata"). Only what is known is
stated. `license`, `language`, `datasets` and the like come from the card of the folder that a model was made from; if
that was loaded from the hub, `base_model` is its hub id.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.checkpoints.files import HUB_ID

CARD = "README.md"
LIBRARY = "dmpt-export"
INHERITED = ("language", "license", "license_name", "license_link", "base_model", "datasets")
ORDER = (*INHERITED[:4], "library_name", "pipeline_tag", *INHERITED[4:], "tags", "model-index")
BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
MOST_BYTES = 4 << 20  # of a card that is read
SNAPSHOT = re.compile(r"models--(.+)")  # a model's folder in the hub client's cache
Value = str | int | float | Sequence[Any] | Mapping[str, Any]


# --- writing ----------------------------------------------------------------------------------------


def card_text(fields: Mapping[str, Value], body: str) -> str:
    """A card: metadata between lines of dashes, in the usual order, then Markdown."""
    rest = [name for name in fields if name not in ORDER]
    return f"---\n{block({name: fields[name] for name in (*ORDER, *rest) if name in fields})}---\n{body}"


def model_fields(tags: Sequence[str], known: Mapping[str, Value], library: str = LIBRARY) -> dict[str, Value]:
    """Metadata of a model: `known` is from inherited()."""
    own: dict[str, Value] = {"library_name": library, "pipeline_tag": "text-generation", "tags": [*dict.fromkeys(tags)]}
    return {**known, **own}


def tags_of(splits: Sequence[int], heads: int) -> list[str]:
    """Tags for a model's architecture."""
    return ["gpt2", "dmpt"] if splits or heads > 1 else ["gpt2"]


def scheme_tags(scheme: str) -> list[str]:
    """Tags for how weights are stored.

    >>> scheme_tags("int8"), scheme_tags("mixed 5.2 bits"), scheme_tags("float")
    (['quantized', 'int8'], ['quantized', 'mixed'], [])
    """
    return [] if scheme == "float" else ["quantized", scheme.split()[0]]


def title(name: str) -> str:
    """A folder's name as one line of Markdown."""
    return " ".join(name.split()) or "model"


def block(value: Mapping[str, Value], indent: int = 0) -> str:
    """Lines of YAML, in block style, for names of letters and for texts, numbers, lists and mappings as values."""
    return "".join(f"{' ' * indent}{name}:{entry(inner, indent)}" for name, inner in value.items())


def entry(value: Any, indent: int) -> str:
    """What stands after `name:`, with the end of the line."""
    if isinstance(value, Mapping):
        return "\n" + block(value, indent + 2)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "\n" + "".join(f"{' ' * indent}-{item(one, indent)}" for one in value) if value else " []\n"
    return f" {scalar(value)}\n"


def item(value: Any, indent: int) -> str:
    """What stands after the dash of a list; a mapping begins on the same line."""
    return f" {block(value, indent + 2).lstrip(' ')}" if isinstance(value, Mapping) else f" {scalar(value)}\n"


def scalar(value: str | float) -> str:
    """A number, or a text: bare where no reader could take it for anything else, else in double quotes."""
    if not isinstance(value, str):
        digits = repr(value)
        return digits if "." in digits else digits.replace("e", ".0e")  # YAML 1.1 takes 1e+16 for a text
    bare = re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_./][A-Za-z0-9]+)*", value) and value.lower() not in WORDS
    return value if bare else f'"{"".join(map(escaped, value))}"'


WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # that YAML 1.1 reads as something else


def escaped(char: str) -> str:
    """A character inside double quotes; YAML allows no others than printable ones."""
    if char in '"\\':
        return f"\\{char}"
    code = ord(char)
    if char.isprintable():
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# --- reading ----------------------------------------------------------------------------------------


def inherited(source: str | os.PathLike[str]) -> dict[str, Value]:
    """What the card of a source folder states that also holds for what is made of it; {} without a card.

    For a folder in the hub client's cache, `base_model` is that model. A name that is no hub id (a local path) and
    anything but texts and lists of texts is left out, as is all of a card that is not YAML.
    """
    folder = Path(source)
    stated = {name: value for name, value in metadata(folder).items() if name in INHERITED and is_text(value)}
    if not all(HUB_ID.fullmatch(base) for base in as_list(stated.get("base_model", []))):
        del stated["base_model"]
    if (base := hub_id(folder)) is not None:
        stated["base_model"] = base
    return stated


def metadata(folder: Path) -> dict[str, Any]:
    """The YAML of a folder's card; {} where there is none, or no mapping."""
    try:
        import yaml
    except ImportError:  # comes with the hub client
        return {}
    try:
        with open(folder / CARD, "rb") as file:
            found = BLOCK.match(file.read(MOST_BYTES).decode("utf-8"))
        value = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def is_text(value: Any) -> bool:
    """Whether a value is a text, or a list of some."""
    many = as_list(value)
    return bool(many) and all(isinstance(one, str) and one for one in many)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def hub_id(folder: Path) -> str | None:
    """The hub id of a snapshot in the hub client's cache: models--OWNER--NAME/snapshots/REVISION.

    >>> hub_id(Path("hub/models--openai-community--gpt2/snapshots/607a30d"))
    'openai-community/gpt2'
    """
    parts = folder.parts
    found = SNAPSHOT.fullmatch(parts[-3]) if len(parts) > 2 and parts[-2] == "snapshots" else None
    return found[1].replace("--", "/", 1) if found else None
