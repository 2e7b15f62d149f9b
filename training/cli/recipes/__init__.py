"""Recipes: the training phases of the original project for each kind of model, one JSON file each.

    {"about": "...", "init": {"splits": [6], "heads": 8}, "phases": [{"max_steps": 30000, ...}, ...]}

`init` describes how a plain GPT-2 becomes the model; each phase starts from the previous phase's model. Options on the
command line override the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.checkpoints.files import read_json
from training.errors import InputError
from training.loop.options import TrainOptions

FOLDER = Path(__file__).parent
INIT = ("splits", "heads", "fast_k", "head_kind", "head_rank", "shared_anchor", "next_tokens")


@dataclass
class Recipe:
    about: str = ""
    init: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=lambda: [{}])  # options of each phase


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def described() -> list[tuple[str, str]]:
    """(name, one-line description) of every recipe, for the help."""
    out = []
    for name in names():
        recipe = read_recipe(name)
        steps = sum(phase.get("max_steps", 0) for phase in recipe.phases)
        count = f"{len(recipe.phases)} phases, " if len(recipe.phases) > 1 else ""
        out.append(
            (
                name,
                f"{recipe.about}  [{count}{f'{steps:,} steps' if steps else 'steps set by --epochs or --max-steps'}]",
            )
        )
    return out


def read_recipe(name: str) -> Recipe:
    """A recipe by name or from a JSON file. Raises InputError naming the part it cannot use."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise InputError(f"there is no recipe '{name}': choose {', '.join(names())}, or give a JSON file")
    try:
        recipe = Recipe(**read_json(path))
        for phase in recipe.phases:
            TrainOptions.from_dict(phase, f"recipe {path}")
        unknown = sorted(set(recipe.init) - set(INIT))
    except TypeError as error:
        raise InputError(f"{path} is not a recipe ({error}): a recipe holds about, init and phases") from error
    if unknown or not recipe.phases:
        raise InputError(f"recipe {path}: {'init has no ' + ', '.join(unknown) if unknown else 'it has no phases'}")
    return recipe
